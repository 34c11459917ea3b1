// Attention of a few query rows over 128 keys. K tiles have tokens in lanes, V tiles have dimensions in lanes:
//   float32:  K [head_dim][16], V [16][head_dim];   bfloat16: K [head_dim / 2][16][2], V [8][head_dim][2].
// Each row has one sequence of operations, whatever rows it is computed with.
#pragma once
#include "../kernels.h"
#include "rows.h"

namespace {

using dovetail::KEY_TILES;
using dovetail::KeyBlock;
using dovetail::KEYS;
using dovetail::State;

// Of short tiles (two to a page of memory) every second line is fetched, because the processor fetches its neighbour too.
// A core can wait for about 24 lines that a program asked for, which are 15 GB/s. Of longer tiles every line is fetched; the
// processor follows them by itself. Measured on Zen 4.
constexpr int SHORT_DIM = 64;

template <int R, int U>
INLINE void scores_bf16(const uint16_t* q, size_t stride, int pairs, const KeyBlock& keys, int first, float* out) {
    F acc[R][U];
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int u = 0; u < U; u++) acc[r][u] = zero();
    for (int d = 0; d < pairs; d++) {
        I k[U];
        UNROLL for (int u = 0; u < U; u++) {
            k[u] = iload((const char*)keys.k[first + u] + 64 * d);
            pin(k[u]);
            if (d % 2 == 0 || pairs > SHORT_DIM / 2) prefetch_far((const char*)keys.next_k[first + u] + 64 * d);
        }
        UNROLL for (int r = 0; r < R; r++) {
            const I x = iall(((const int32_t*)(q + r * stride))[d]);
            UNROLL for (int u = 0; u < U; u++) acc[r][u] = dot_bf16(acc[r][u], k[u], x);
        }
    }
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int u = 0; u < U; u++) store(out + r * KEYS + (first + u) * 16, acc[r][u]);
}

template <int R, int U>
INLINE void scores_f32(const float* q, size_t stride, int n, const KeyBlock& keys, int first, float* out) {
    F acc[R][U];
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int u = 0; u < U; u++) acc[r][u] = zero();
    for (int d = 0; d < n; d++) {
        F k[U];
        UNROLL for (int u = 0; u < U; u++) {
            k[u] = load((const float*)keys.k[first + u] + 16 * d);
            prefetch_far((const float*)keys.next_k[first + u] + 16 * d);
            pin(k[u]);
        }
        UNROLL for (int r = 0; r < R; r++) {
            const F x = all(q[r * stride + d]);
            UNROLL for (int u = 0; u < U; u++) acc[r][u] = fma(k[u], x, acc[r][u]);
        }
    }
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int u = 0; u < U; u++) store(out + r * KEYS + (first + u) * 16, acc[r][u]);
}

// Tiles [u, keys.last) in steps of U, then of half of it.
template <bool WIDE, int R, int U> INLINE void scores_from(const void* q, size_t stride, int n, const KeyBlock& keys,
                                                           int u, float* out) {
    for (; u + U <= keys.last; u += U) {
        if (WIDE) scores_f32<R, U>((const float*)q, stride, n, keys, u, out);
        else scores_bf16<R, U>((const uint16_t*)q, stride, n / 2, keys, u, out);
    }
    if constexpr (U > 2) scores_from<WIDE, R, U / 2>(q, stride, n, keys, u, out);
}

// ---- softmax and V

INLINE F lanes_from(int first) {
    alignas(64) static const float LANES[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return add(load(LANES), all((float)first));
}

INLINE bool whole(const KeyBlock& keys) { return keys.first == 0 && keys.last == KEY_TILES; }

// The largest score of a row, those outside [from, to] replaced by -infinity.
INLINE float largest(float* scores, const KeyBlock& keys, int from, int to) {
    const F none = all(-__builtin_inff());
    F high = none;
    if (whole(keys) && from <= 0 && to >= KEYS - 1) {
        UNROLL for (int u = 0; u < KEY_TILES; u++) high = max(high, load(scores + 16 * u));
        return highest(high);
    }
    for (int u = keys.first; u < keys.last; u++) {
        F s = load(scores + 16 * u);
        if (16 * u < from || 16 * u + 15 > to) {
            const F at = lanes_from(16 * u);
            s = choose(both(not_less(at, all((float)from)), not_less(all((float)to), at)), s, none);
            store(scores + 16 * u, s);
        }
        high = max(high, s);
    }
    return highest(high);
}

// Turn a row of scores into weights relative to its maximum; their sum.
template <bool WIDE, bool WHOLE> INLINE float weigh(float* scores, const KeyBlock& keys, float most) {
    constexpr float LOG2E = 1.44269504f;
    const F base = all(most == -__builtin_inff() ? 0.0f : most), low = mul(base, all(-LOG2E));
    F parts[KEY_TILES / 2];
    UNROLL for (int j = 0; j < KEY_TILES / 2; j++) {
        parts[j] = zero();
        if (!WHOLE && (2 * j < keys.first || 2 * j >= keys.last)) continue;
        F a = load(scores + 32 * j), b = load(scores + 32 * j + 16);
        if (WIDE) {
            a = exponential(sub(a, base)), b = exponential(sub(b, base));
            store(scores + 32 * j, a), store(scores + 32 * j + 16, b);
        } else {
            a = power_of_two(fma(a, all(LOG2E), low)), b = power_of_two(fma(b, all(LOG2E), low));
            store_bf16_pair(scores + 16 * j, a, b);  // weights replace scores, in half the room
        }
        parts[j] = add(a, b);
    }
    return sum(add(add(parts[0], parts[1]), add(parts[2], parts[3])));
}

template <int R, int V> INLINE void mix_bf16(const uint16_t* p, int n, const KeyBlock& keys, int d, float* out, int stride) {
    F acc[R][V];
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int v = 0; v < V; v++) acc[r][v] = zero();
    for (int u = keys.first; u < keys.last; u++)
        for (int t = 0; t < 8; t++) {
            const size_t at = ((size_t)t * n + d) * 4;
            I x[V];
            UNROLL for (int v = 0; v < V; v++) {
                x[v] = iload((const char*)keys.v[u] + at + 64 * v);
                pin(x[v]);
                if ((d / 16 + v) % 2 == 0 || n > SHORT_DIM) prefetch_far((const char*)keys.next_v[u] + at + 64 * v);
            }
            UNROLL for (int r = 0; r < R; r++) {
                const I w = iall(((const int32_t*)(p + r * 2 * KEYS))[8 * u + t]);  // rows keep the scores' stride
                UNROLL for (int v = 0; v < V; v++) acc[r][v] = dot_bf16(acc[r][v], x[v], w);
            }
        }
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int v = 0; v < V; v++) store(out + r * stride + d + 16 * v, acc[r][v]);
}

template <int R, int V> INLINE void mix_f32(const float* p, int n, const KeyBlock& keys, int d, float* out, int stride) {
    F acc[R][V];
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int v = 0; v < V; v++) acc[r][v] = zero();
    for (int u = keys.first; u < keys.last; u++)
        for (int t = 0; t < 16; t++) {
            const size_t at = (size_t)t * n + d;
            F x[V];
            UNROLL for (int v = 0; v < V; v++) {
                x[v] = load((const float*)keys.v[u] + at + 16 * v);
                prefetch_far((const float*)keys.next_v[u] + at + 16 * v);
                pin(x[v]);
            }
            UNROLL for (int r = 0; r < R; r++) {
                const F w = all(p[r * KEYS + 16 * u + t]);
                UNROLL for (int v = 0; v < V; v++) acc[r][v] = fma(x[v], w, acc[r][v]);
            }
        }
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int v = 0; v < V; v++) store(out + r * stride + d + 16 * v, acc[r][v]);
}

template <bool WIDE, int R> void mix_rows(float* scores, int n, const KeyBlock& keys, State& state, int first) {
    // In two loops: a row's exponentials need not wait for its own maximum.
    for (int r = 0; r < R; r++)
        state.max[first + r] = largest(scores + r * KEYS, keys, state.from[first + r], state.to[first + r]);
    for (int r = 0; r < R; r++) {
        float *row = scores + r * KEYS, most = state.max[first + r];
        state.sum[first + r] = whole(keys) ? weigh<WIDE, true>(row, keys, most) : weigh<WIDE, false>(row, keys, most);
    }
    float* out = state.out + first * state.stride;
    int d = 0;
    for (; d + 16 * VALUE_STEP <= n; d += 16 * VALUE_STEP) {
        if (WIDE) mix_f32<R, VALUE_STEP>(scores, n, keys, d, out, state.stride);
        else mix_bf16<R, VALUE_STEP>((const uint16_t*)scores, n, keys, d, out, state.stride);
    }
    for (; d < n; d += 16) {
        if (WIDE) mix_f32<R, 1>(scores, n, keys, d, out, state.stride);
        else mix_bf16<R, 1>((const uint16_t*)scores, n, keys, d, out, state.stride);
    }
}

template <bool WIDE, int R>
void scores_by(const void* q, size_t stride, int rows, int n, const KeyBlock& keys, float* out) {
    if (rows == R) return scores_from<WIDE, R, KEY_STEP>(q, stride, n, keys, keys.first, out);
    if constexpr (R > 1) scores_by<WIDE, R - 1>(q, stride, rows, n, keys, out);
}
template <bool WIDE> void scores(const void* q, size_t stride, int rows, int n, const KeyBlock& keys, float* out) {
    for (int r = 0; r < rows; r += QUERIES) {
        const int some = rows - r < QUERIES ? rows - r : QUERIES;
        scores_by<WIDE, QUERIES>((const char*)q + r * stride * (WIDE ? 4 : 2), stride, some, n, keys, out + r * KEYS);
    }
}
template <bool WIDE, int R>
void mix_by(float* scores, int rows, int n, const KeyBlock& keys, State& state, int first) {
    if (rows == R) return mix_rows<WIDE, R>(scores, n, keys, state, first);
    if constexpr (R > 1) mix_by<WIDE, R - 1>(scores, rows, n, keys, state, first);
}
template <bool WIDE> void mix(float* scores, int rows, int n, const KeyBlock& keys, State& state) {
    for (int r = 0; r < rows; r += QUERIES) {
        const int some = rows - r < QUERIES ? rows - r : QUERIES;
        mix_by<WIDE, QUERIES>(scores + r * KEYS, some, n, keys, state, r);
    }
}

void merge(float* const* records, int rows, const State& state, int n) {
    alignas(64) float old_max[16] = {}, old_sum[16] = {}, new_max[16] = {}, new_sum[16] = {}, old_by[16], new_by[16];
    for (int r = 0; r < rows; r++) {
        old_max[r] = records[r][n], old_sum[r] = records[r][n + 1];
        new_max[r] = state.max[r], new_sum[r] = state.sum[r];
    }
    const F none = all(-__builtin_inff()), a = load(old_max), b = load(new_max);
    const F most = choose(not_less_equal(a, b), a, b), base = choose(not_less_equal(most, none), most, zero());
    const F by_a = exponential(sub(a, base)), by_b = exponential(sub(b, base));
    store(old_max, most), store(old_by, by_a), store(new_by, by_b);
    store(old_sum, add(mul(by_a, load(old_sum)), mul(by_b, load(new_sum))));
    for (int r = 0; r < rows; r++) {
        float* to = records[r];
        const float* from = state.out + r * state.stride;
        to[n] = old_max[r], to[n + 1] = old_sum[r];
        for (int i = 0; i < n; i += 16)
            store(to + i, fma(load(from + i), all(new_by[r]), mul(load(to + i), all(old_by[r]))));
    }
}

// ---- the write of a token

bool finite(const float* x, int n) {
    constexpr float LARGEST = 3.38e38f;  // stays finite as bfloat16
    bool ok = true;
    int i = 0;
    for (; i + 32 <= n; i += 32) ok &= highest_magnitude(load(x + i), load(x + i + 16)) <= LARGEST;
    if (i < n) ok &= highest_magnitude(load(x + i), zero()) <= LARGEST;
    return ok;
}

bool write_bf16(const float* k, const float* v, int n, int t, uint8_t* k_tile, uint8_t* v_tile) {
    if (!finite(k, n) || !finite(v, n)) return false;
    alignas(64) uint16_t rounded[512];
    for (int d = 0; d < n; d += 16) store_bf16(rounded + d, load(k + d));
    uint8_t* to = k_tile + 4 * t;
    for (int d = 0; d < n; d += 2) __builtin_memcpy(to + 32 * d, rounded + d, 4);
    for (int d = 0; d < n; d += 16) store_bf16(rounded + d, load(v + d));
    uint16_t* pairs = (uint16_t*)v_tile + (size_t)(t / 2) * 2 * n + t % 2;
    for (int d = 0; d < n; d++) pairs[2 * d] = rounded[d];  // one by one: another thread may write the other token
    return true;
}

inline void add_attention(dovetail::Kernels& k) {
    k.scores[dovetail::KV_F32] = scores<true>, k.scores[dovetail::KV_BF16] = scores<false>;
    k.mix[dovetail::KV_F32] = mix<true>, k.mix[dovetail::KV_BF16] = mix<false>;
    k.merge = merge, k.write_bf16 = write_bf16;
}

}  // namespace
