// Attention of a few query rows over 64 keys. K tiles have tokens in lanes, V tiles have dimensions in lanes:
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
            prefetch_far((const char*)keys.next_k[first + u] + 64 * d);
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

template <int R> void scores_rows(bool wide, const void* q, size_t stride, int n, const KeyBlock& keys, float* out) {
    for (int u = 0; u < KEY_TILES; u += KEY_STEP) {
        if (wide) scores_f32<R, KEY_STEP>((const float*)q, stride, n, keys, u, out);
        else scores_bf16<R, KEY_STEP>((const uint16_t*)q, stride, n / 2, keys, u, out);
    }
}

// ---- softmax and V

// Turn a row of scores into weights relative to the new maximum; the factor that older sums must be scaled by.
template <bool WIDE> INLINE float weigh(float* scores, float& most, float& total) {
    F s[KEY_TILES];
    UNROLL for (int u = 0; u < KEY_TILES; u++) s[u] = load(scores + 16 * u);
    const float high = highest(max(max(s[0], s[1]), max(s[2], s[3])));
    const float now = most > high ? most : high;
    const float base = now == -__builtin_inff() ? 0.0f : now;
    float by = 1.0f;
    constexpr float LOG2E = 1.44269504f;
    if (now > most) {
        by = lane(WIDE ? exponential(all(most - base)) : power_of_two(all((most - base) * LOG2E)), 0);
        total *= by;
    }
    most = now;
    UNROLL for (int u = 0; u < KEY_TILES; u++) {
        if (WIDE) s[u] = exponential(sub(s[u], all(base)));
        else s[u] = power_of_two(mul(sub(s[u], all(base)), all(LOG2E)));
        if (WIDE) store(scores + 16 * u, s[u]);
    }
    if (!WIDE) {
        store_bf16_pair(scores, s[0], s[1]);  // weights take the place of the scores, in half the room
        store_bf16_pair(scores + 16, s[2], s[3]);
    }
    total += sum(add(add(s[0], s[1]), add(s[2], s[3])));
    return by;
}

template <int R, int V>
INLINE void mix_bf16(const uint16_t* p, int n, const KeyBlock& keys, int d, float* out, const float* by) {
    F acc[R][V];
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int v = 0; v < V; v++) acc[r][v] = mul(load(out + r * n + d + 16 * v), all(by[r]));
    for (int t = 0; t < KEYS / 2; t++) {
        const size_t at = ((size_t)(t % 8) * n + d) * 4;
        I x[V];
        UNROLL for (int v = 0; v < V; v++) {
            x[v] = iload((const char*)keys.v[t / 8] + at + 64 * v);
            pin(x[v]);
            prefetch_far((const char*)keys.next_v[t / 8] + at + 64 * v);
        }
        UNROLL for (int r = 0; r < R; r++) {
            const I w = iall(((const int32_t*)(p + r * 2 * KEYS))[t])  /* rows keep the scores' stride */;
            UNROLL for (int v = 0; v < V; v++) acc[r][v] = dot_bf16(acc[r][v], x[v], w);
        }
    }
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int v = 0; v < V; v++) store(out + r * n + d + 16 * v, acc[r][v]);
}

template <int R, int V>
INLINE void mix_f32(const float* p, int n, const KeyBlock& keys, int d, float* out, const float* by) {
    F acc[R][V];
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int v = 0; v < V; v++) acc[r][v] = mul(load(out + r * n + d + 16 * v), all(by[r]));
    for (int t = 0; t < KEYS; t++) {
        const size_t at = (size_t)(t % 16) * n + d;
        F x[V];
        UNROLL for (int v = 0; v < V; v++) {
            x[v] = load((const float*)keys.v[t / 16] + at + 16 * v);
            prefetch_far((const float*)keys.next_v[t / 16] + at + 16 * v);
            pin(x[v]);
        }
        UNROLL for (int r = 0; r < R; r++) {
            const F w = all(p[r * KEYS + t]);
            UNROLL for (int v = 0; v < V; v++) acc[r][v] = fma(x[v], w, acc[r][v]);
        }
    }
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int v = 0; v < V; v++) store(out + r * n + d + 16 * v, acc[r][v]);
}

template <bool WIDE, int R> void fold_rows(float* scores, int n, const KeyBlock& keys, State& state, int first) {
    float by[R];
    UNROLL for (int r = 0; r < R; r++)
        by[r] = weigh<WIDE>(scores + r * KEYS, state.max[first + r], state.sum[first + r]);
    float* out = state.out + (size_t)first * n;
    int d = 0;
    for (; d + 16 * VALUE_STEP <= n; d += 16 * VALUE_STEP) {
        if (WIDE) mix_f32<R, VALUE_STEP>(scores, n, keys, d, out, by);
        else mix_bf16<R, VALUE_STEP>((const uint16_t*)scores, n, keys, d, out, by);
    }
    for (; d < n; d += 16) {
        if (WIDE) mix_f32<R, 1>(scores, n, keys, d, out, by);
        else mix_bf16<R, 1>((const uint16_t*)scores, n, keys, d, out, by);
    }
}

template <bool WIDE, int R>
void scores_by(const void* q, size_t stride, int rows, int n, const KeyBlock& keys, float* out) {
    if (rows == R) return scores_rows<R>(WIDE, q, stride, n, keys, out);
    if constexpr (R > 1) scores_by<WIDE, R - 1>(q, stride, rows, n, keys, out);
}
template <bool WIDE> void scores(const void* q, size_t stride, int rows, int n, const KeyBlock& keys, float* out) {
    for (int r = 0; r < rows; r += QUERIES) {
        const int some = rows - r < QUERIES ? rows - r : QUERIES;
        scores_by<WIDE, QUERIES>((const char*)q + r * stride * (WIDE ? 4 : 2), stride, some, n, keys, out + r * KEYS);
    }
}
template <bool WIDE, int R>
void fold_by(float* scores, int rows, int n, const KeyBlock& keys, State& state, int first) {
    if (rows == R) return fold_rows<WIDE, R>(scores, n, keys, state, first);
    if constexpr (R > 1) fold_by<WIDE, R - 1>(scores, rows, n, keys, state, first);
}
template <bool WIDE> void fold(float* scores, int rows, int n, const KeyBlock& keys, State& state) {
    for (int r = 0; r < rows; r += QUERIES) {
        const int some = rows - r < QUERIES ? rows - r : QUERIES;
        fold_by<WIDE, QUERIES>(scores + r * KEYS, some, n, keys, state, r);
    }
}

void merge(float* a_max, float* a_sum, float* a_out, float b_max, float b_sum, const float* b_out, int n) {
    const float most = *a_max > b_max ? *a_max : b_max;
    const float base = most == -__builtin_inff() ? 0.0f : most;
    const float a = lane(exponential(all(*a_max - base)), 0), b = lane(exponential(all(b_max - base)), 0);
    *a_sum = a * *a_sum + b * b_sum;
    *a_max = most;
    for (int i = 0; i < n; i += 16) store(a_out + i, fma(load(b_out + i), all(b), mul(load(a_out + i), all(a))));
}

inline void add_attention(dovetail::Kernels& k) {
    k.scores[dovetail::KV_F32] = scores<true>, k.scores[dovetail::KV_BF16] = scores<false>;
    k.fold[dovetail::KV_F32] = fold<true>, k.fold[dovetail::KV_BF16] = fold<false>;
    k.merge = merge;
}

}  // namespace
