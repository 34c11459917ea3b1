// Sixteen keys as coefficients times a basis, rotated at their positions, into a tile of attention's.
#pragma once
#include "../kernels.h"
#include "rows.h"

namespace {

using dovetail::RebuildArgs;

template <bool WIDE, int R, int V> INLINE void product(const RebuildArgs& a, int row, int d, float* out) {
    F acc[R][V];
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int v = 0; v < V; v++) acc[r][v] = zero();
    constexpr int STEP = WIDE ? 1 : 2;
    for (int k = 0; k < a.rank; k += STEP) {
        const uint8_t* from = a.basis + ((size_t)k * a.n + (size_t)d * STEP) * (WIDE ? 4 : 2);
        UNROLL for (int v = 0; v < V; v++) {
            if (WIDE) {
                const F b = load((const float*)from + 16 * v);
                UNROLL for (int r = 0; r < R; r++)
                    acc[r][v] = fma(all(((const float*)a.coefficients)[(size_t)(row + r) * a.rank + k]), b, acc[r][v]);
            } else {
                const I b = iload(from + 64 * v);
                UNROLL for (int r = 0; r < R; r++) {
                    int32_t pair;
                    __builtin_memcpy(&pair, (const uint16_t*)a.coefficients + (size_t)(row + r) * a.rank + k, 4);
                    acc[r][v] = dot_bf16(acc[r][v], b, iall(pair));
                }
            }
        }
    }
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int v = 0; v < V; v++) store(out + (size_t)(row + r) * a.n + d + 16 * v, acc[r][v]);
}

// cos and sin of the angle at position a.first + t. A model rounds position times frequency to float32. So these are
// cos(a + b) and sin(a + b) of the exact angles, corrected by what that rounding changes.
INLINE void angles_of(const dovetail::Angles& a, int t, float* cos, float* sin) {
    const float *beyond = a.beyond + (size_t)t * 2 * a.half, *first = a.at_first;
    const F position = all((float)(a.first + t));
    for (int i = 0; i < a.half; i += 16) {
        const F c = load(first + i), s = load(first + a.half + i), dc = load(beyond + i), ds = load(beyond + a.half + i);
        const F x = sub(mul(c, dc), mul(s, ds)), y = fma(s, dc, mul(c, ds));
        const F f = load(a.frequencies + i), lost = fma(position, f, sub(zero(), mul(position, f)));
        const F half = mul(lost, all(0.5f));
        store(cos + i, add(x, mul(lost, sub(y, mul(half, x)))));
        store(sin + i, sub(y, mul(lost, add(x, mul(half, y)))));
    }
}

template <bool WIDE> void rebuild(const RebuildArgs& a) {
    alignas(64) float keys[16 * 512];
    alignas(64) float turned[512] = {}, cos[256], sin[256];
    alignas(64) uint16_t rounded[512];
    for (int row = 0; row < 16; row += 4) {
        int d = 0;
        for (; d + 32 <= a.n; d += 32) product<WIDE, 4, 2>(a, row, d, keys);
        for (; d < a.n; d += 16) product<WIDE, 4, 1>(a, row, d, keys);
    }
    for (int t = 0; t < 16; t++) {
        angles_of(a.angles, t, cos, sin);
        rotate(keys + (size_t)t * a.n, cos, sin, 1.0f, a.dim, turned);
        if (WIDE) {
            for (int d = 0; d < a.n; d++) ((float*)a.out)[16 * d + t] = turned[d];
            continue;
        }
        for (int d = 0; d < a.n; d += 16) store_bf16(rounded + d, load(turned + d));
        for (int d = 0; d < a.n; d += 2) __builtin_memcpy(a.out + 32 * d + 4 * t, rounded + d, 4);
    }
}

inline void add_low_rank(dovetail::Kernels& k) {
    k.rebuild[dovetail::KV_F32] = rebuild<true>, k.rebuild[dovetail::KV_BF16] = rebuild<false>;
}

}  // namespace
