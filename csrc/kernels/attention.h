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
using dovetail::KVStored;
using dovetail::State;
using dovetail::STORE_BF16;
using dovetail::STORE_F32;
using dovetail::STORE_FP8;
using dovetail::STORE_INT4;
using dovetail::STORE_INT8;

// Of short tiles (two to a page of memory) every second line is fetched, because the processor fetches its neighbour too.
// A core can wait for about 24 lines that a program asked for, which are 15 GB/s. Of longer tiles every line is fetched; the
// processor follows them by itself. Measured on Zen 4.
constexpr int SHORT_DIM = 64;

// Register blocks of R rows are functions of their own: inlined into their loops they would lose registers to them.
#define BLOCK_OF_ROWS __attribute__((noinline)) void

// Thirty-two values as bfloat16. Codes with four bits: from the low or from the high halves.
template <KVStored S> INLINE I vector_of(const void* from, bool high) {
    if constexpr (S == STORE_INT8) return bytes_as_bf16(from);
    else if constexpr (S == STORE_FP8) return eights_as_bf16(from);
    else if constexpr (S == STORE_INT4) return high ? fours_as_bf16<1>(from) : fours_as_bf16<0>(from);
    else return iload(from);
}
// By how much codes are smaller than bfloat16, as a shift.
template <KVStored S> constexpr int NARROW = S == STORE_INT4 ? 2 : S == STORE_BF16 ? 0 : 1;

// AHEAD: fetch what comes next.
template <KVStored S, int R, int U, bool AHEAD>
BLOCK_OF_ROWS scores_bf16(const uint16_t* q, size_t stride, int pairs, const KeyBlock& keys, int first, float* out) {
    F acc[R][U];
    const char *tile[U], *x = (const char*)q;
    size_t row[R];
    UNROLL for (int u = 0; u < U; u++) tile[u] = (const char*)keys.k[first + u];
    UNROLL for (int r = 0; r < R; r++) {
        row[r] = r * stride * 2;
        if (r) hold(row[r]);
        UNROLL for (int u = 0; u < U; u++) acc[r][u] = zero();
    }
    constexpr int VECTORS = S == STORE_INT4 ? 2 : 1;  // that share their codes
    for (size_t d = 0; d < (size_t)pairs * 64; d += 64 * VECTORS)
        UNROLL for (int j = 0; j < VECTORS; j++, x += 4) {
            I k[U];
            UNROLL for (int u = 0; u < U; u++) {
                k[u] = vector_of<S>(tile[u] + (d >> NARROW<S>), j);
                pin(k[u]);
                if (AHEAD && j == 0 && (d % 128 == 0 || pairs > SHORT_DIM / 2))
                    prefetch_far((const char*)keys.next_k[first + u] + (d >> keys.next_shift));
            }
            UNROLL for (int r = 0; r < R; r++) {
                const I y = iall(*(const int32_t*)(x + row[r]));
                UNROLL for (int u = 0; u < U; u++) acc[r][u] = dot_bf16(acc[r][u], k[u], y);
            }
        }
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int u = 0; u < U; u++) store(out + r * KEYS + (first + u) * 16, acc[r][u]);
}

template <int R, int U, bool AHEAD>
BLOCK_OF_ROWS scores_f32(const float* q, size_t stride, int n, const KeyBlock& keys, int first, float* out) {
    F acc[R][U];
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int u = 0; u < U; u++) acc[r][u] = zero();
    for (int d = 0; d < n; d++) {
        F k[U];
        UNROLL for (int u = 0; u < U; u++) {
            k[u] = load((const float*)keys.k[first + u] + 16 * d);
            if (AHEAD) prefetch_far((const float*)keys.next_k[first + u] + 16 * d);
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

template <KVStored S, int R, int U, bool AHEAD>
INLINE void scores_of(const void* q, size_t stride, int n, const KeyBlock& keys, int u, float* out) {
    if constexpr (S == STORE_F32) scores_f32<R, U, AHEAD>((const float*)q, stride, n, keys, u, out);
    else scores_bf16<S, R, U, AHEAD>((const uint16_t*)q, stride, n / 2, keys, u, out);
}
template <KVStored S, int R, int U>
void scores_by(const void* q, size_t stride, int rows, int n, const KeyBlock& keys, int u, bool ahead, float* out) {
    constexpr bool ONCE = S == STORE_F32 || S == STORE_BF16;  // codes always fetch: they are for a few rows
    if (rows == R && (ahead || !ONCE)) return scores_of<S, R, U, true>(q, stride, n, keys, u, out);
    if constexpr (ONCE)
        if (rows == R) return scores_of<S, R, U, false>(q, stride, n, keys, u, out);
    if constexpr (R > 1) scores_by<S, R - 1, U>(q, stride, rows, n, keys, u, ahead, out);
}

// Tiles [u, keys.last) in steps of U, then of half of it. All rows meet the tiles of a step, and the first ones fetch.
template <KVStored S, int U>
void scores_from(const void* q, size_t stride, int rows, int n, const KeyBlock& keys, int u, float* out) {
    for (; u + U <= keys.last; u += U)
        for (int r = 0; r < rows; r += QUERIES) {
            const int some = rows - r < QUERIES ? rows - r : QUERIES;
            const char* from = (const char*)q + r * stride * (S == STORE_F32 ? 4 : 2);
            scores_by<S, QUERIES, U>(from, stride, some, n, keys, u, r == 0, out + r * KEYS);
        }
    if constexpr (U > 2) scores_from<S, U / 2>(q, stride, rows, n, keys, u, out);
}
// What codes of 0 mean that count from the middle: low + 8 scale.
INLINE F middle_of(const float* scales) { return fma(load(scales), all(8.0f), load(scales + 16)); }

// A row's scores with codes, as those with the keys.
INLINE void rescale(const uint16_t* q, int n, const KeyBlock& keys, float* out) {
    F total = zero();
    for (int i = 0; keys.lows && i < n; i += 16) total = add(total, bf16(q + i));
    const F shared = all(sum(total));
    for (int u = keys.first; u < keys.last; u++) {
        const F scale = load(keys.k_scales[u]), s = mul(load(out + 16 * u), scale);
        store(out + 16 * u, keys.lows ? fma(middle_of(keys.k_scales[u]), shared, s) : s);
    }
}

template <bool WIDE> void scores(const void* q, size_t stride, int rows, int n, const KeyBlock& keys, float* out) {
    const auto from = WIDE ? scores_from<STORE_F32, KEY_STEP> : keys.stored == STORE_INT8 ? scores_from<STORE_INT8, KEY_STEP>
                      : keys.stored == STORE_INT4 ? scores_from<STORE_INT4, KEY_STEP>
                      : keys.stored == STORE_FP8  ? scores_from<STORE_FP8, KEY_STEP> : scores_from<STORE_BF16, KEY_STEP>;
    from(q, stride, rows, n, keys, keys.first, out);
    for (int r = 0; !WIDE && keys.coded && r < rows; r++) rescale((const uint16_t*)q + r * stride, n, keys, out + r * KEYS);
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

// Turn a row of scores into weights relative to its maximum; their sum. Weights of codes are multiplied with their scales,
// and `low` is the sum of the weighted lows.
template <bool WIDE, bool WHOLE> INLINE float weigh(float* scores, const KeyBlock& keys, float most, float* low) {
    constexpr float LOG2E = 1.44269504f;
    const F base = all(most == -__builtin_inff() ? 0.0f : most), shift = mul(base, all(-LOG2E));
    F parts[KEY_TILES / 2], lows = zero();
    UNROLL for (int j = 0; j < KEY_TILES / 2; j++) {
        parts[j] = zero();
        if (!WHOLE && (2 * j < keys.first || 2 * j >= keys.last)) continue;
        F a = load(scores + 32 * j), b = load(scores + 32 * j + 16);
        if (WIDE) {
            a = exponential(sub(a, base)), b = exponential(sub(b, base));
            store(scores + 32 * j, a), store(scores + 32 * j + 16, b);
        } else {
            a = power_of_two(fma(a, all(LOG2E), shift)), b = power_of_two(fma(b, all(LOG2E), shift));
        }
        parts[j] = add(a, b);
        if (WIDE) continue;
        if (keys.lows) lows = fma(a, middle_of(keys.v_scales[2 * j]), fma(b, middle_of(keys.v_scales[2 * j + 1]), lows));
        if (keys.coded) a = mul(a, load(keys.v_scales[2 * j])), b = mul(b, load(keys.v_scales[2 * j + 1]));
        store_bf16_pair(scores + 16 * j, a, b);  // weights replace scores, in half the room
    }
    *low = keys.lows ? sum(lows) : 0;
    return sum(add(add(parts[0], parts[1]), add(parts[2], parts[3])));
}

template <KVStored S, int R, int V, bool AHEAD>
BLOCK_OF_ROWS mix_bf16(const uint16_t* p, int n, const KeyBlock& keys, int d, float* out, int stride) {
    F acc[R][V];
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int v = 0; v < V; v++) acc[r][v] = zero();
    for (int u = keys.first; u < keys.last; u++)
        for (int t = 0; t < 8; t++) {
            const size_t at = ((size_t)t * n + d) * 4;
            const size_t row = S == STORE_INT4 ? (size_t)t * ((n + 31) / 32 * 32) + d / 32 * 32 : at >> NARROW<S>;
            I x[V];
            UNROLL for (int v = 0; v < V; v++) {
                const size_t vector = S == STORE_INT4 ? v / 2 * 32 : v * (64 >> NARROW<S>);
                x[v] = vector_of<S>((const char*)keys.v[u] + row + vector, V == 1 ? d / 16 % 2 : v % 2);
                pin(x[v]);
                if (AHEAD && ((d / 16 + v) % 2 == 0 || n > SHORT_DIM))
                    prefetch_far((const char*)keys.next_v[u] + ((at + 64 * v) >> keys.next_shift));
            }
            UNROLL for (int r = 0; r < R; r++) {
                const I w = iall(((const int32_t*)(p + r * 2 * KEYS))[8 * u + t]);  // rows keep the scores' stride
                UNROLL for (int v = 0; v < V; v++) acc[r][v] = dot_bf16(acc[r][v], x[v], w);
            }
        }
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int v = 0; v < V; v++) store(out + r * stride + d + 16 * v, acc[r][v]);
}

template <int R, int V, bool AHEAD>
BLOCK_OF_ROWS mix_f32(const float* p, int n, const KeyBlock& keys, int d, float* out, int stride) {
    F acc[R][V];
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int v = 0; v < V; v++) acc[r][v] = zero();
    for (int u = keys.first; u < keys.last; u++)
        for (int t = 0; t < 16; t++) {
            const size_t at = (size_t)t * n + d;
            F x[V];
            UNROLL for (int v = 0; v < V; v++) {
                x[v] = load((const float*)keys.v[u] + at + 16 * v);
                if (AHEAD) prefetch_far((const float*)keys.next_v[u] + at + 16 * v);
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

template <KVStored S, int R, int V, bool AHEAD>
INLINE void mix_of(const float* scores, int n, const KeyBlock& keys, int d, float* out, int stride) {
    if constexpr (S == STORE_F32) mix_f32<R, V, AHEAD>(scores, n, keys, d, out, stride);
    else mix_bf16<S, R, V, AHEAD>((const uint16_t*)scores, n, keys, d, out, stride);
}
template <KVStored S, int R, int V>
void mix_by(const float* scores, int rows, int n, const KeyBlock& keys, int d, bool ahead, float* out, int stride) {
    constexpr bool ONCE = S == STORE_F32 || S == STORE_BF16;
    if (rows == R && (ahead || !ONCE)) return mix_of<S, R, V, true>(scores, n, keys, d, out, stride);
    if constexpr (ONCE)
        if (rows == R) return mix_of<S, R, V, false>(scores, n, keys, d, out, stride);
    if constexpr (R > 1) mix_by<S, R - 1, V>(scores, rows, n, keys, d, ahead, out, stride);
}

// Dimensions [d, n) in steps of V vectors, then of one.
template <KVStored S, int V>
void mix_from(const float* scores, int rows, int n, const KeyBlock& keys, int d, const State& state) {
    for (; d + 16 * V <= n; d += 16 * V)
        for (int r = 0; r < rows; r += QUERIES) {
            const int some = rows - r < QUERIES ? rows - r : QUERIES;
            mix_by<S, QUERIES, V>(scores + r * KEYS, some, n, keys, d, r == 0, state.out + r * state.stride, state.stride);
        }
    if constexpr (V > 1) mix_from<S, 1>(scores, rows, n, keys, d, state);
}
template <bool WIDE> void mix(float* scores, int rows, int n, const KeyBlock& keys, State& state) {
    // In two loops: a row's exponentials need not wait for its own maximum.
    float low[dovetail::MAX_QUERIES];
    for (int r = 0; r < rows; r++) state.max[r] = largest(scores + r * KEYS, keys, state.from[r], state.to[r]);
    for (int r = 0; r < rows; r++) {
        float *row = scores + r * KEYS, most = state.max[r];
        state.sum[r] = whole(keys) ? weigh<WIDE, true>(row, keys, most, low + r) : weigh<WIDE, false>(row, keys, most, low + r);
    }
    const auto from = WIDE ? mix_from<STORE_F32, VALUE_STEP> : keys.stored == STORE_INT8 ? mix_from<STORE_INT8, VALUE_STEP>
                      : keys.stored == STORE_INT4 ? mix_from<STORE_INT4, VALUE_STEP>
                      : keys.stored == STORE_FP8  ? mix_from<STORE_FP8, VALUE_STEP> : mix_from<STORE_BF16, VALUE_STEP>;
    from(scores, rows, n, keys, 0, state);
    for (int r = 0; keys.lows && r < rows; r++)
        for (float *out = state.out + r * state.stride, *end = out + n; out < end; out += 16)
            store(out, add(load(out), all(low[r])));
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
    k.merge = merge, k.write_bf16 = write_bf16, k.queries = QUERIES;
}

}  // namespace
