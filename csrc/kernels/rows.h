// Work on one row: norm, quantization, rotation, activation functions, argmax.
#pragma once
#include "../kernels.h"

namespace {

// e^x, 2.3e-7 relative; below the smallest normal number 0; NaN stays NaN. Cody and Waite's split of ln 2.
INLINE F exponential(F x) {
    const M finite = not_less(x, all(-87.33654f));
    const F c = min(all(88.37f), x);  // in this order NaN stays
    const F n = round_even(mul(c, all(1.44269504f)));
    const F r = fma(n, all(2.12194440e-4f), fma(n, all(-0.693359375f), c));
    F p = fma(r, all(1.0f / 120), all(1.0f / 24));
    p = fma(r, p, all(1.0f / 6));
    p = fma(r, p, all(0.5f));
    p = fma(r, p, all(1.0f));
    p = fma(r, p, all(1.0f));
    return times_power_of_two(finite, p, n);
}

// 2^x for x below 1, within 2.6e-6 relative, which is enough for bfloat16. Zero below 2^-126; NaN stays NaN.
INLINE F power_of_two(F x) {
    const M finite = not_less(x, all(-126.0f));
    const F n = round_even(x), f = sub(x, n);
    F p = fma(f, all(0.0095701f), all(0.05591786f));
    p = fma(f, p, all(0.24024745f));
    p = fma(f, p, all(0.69312181f));
    p = fma(f, p, all(0.99999926f));
    return times_power_of_two(finite, p, n);
}

// tanh, through e^(-2|x|), with the sign put back
INLINE F hyperbolic_tangent(F x) {
    const F e = exponential(mul(magnitude(x), all(-2.0f)));
    const F t = div(sub(all(1.0f), e), add(all(1.0f), e));
    return ior_sign(t, x);
}

// Abramowitz and Stegun 7.1.26, absolute error 1.5e-7
INLINE F error_function(F x) {
    const F a = magnitude(x), t = div(all(1.0f), fma(a, all(0.3275911f), all(1.0f)));
    F p = fma(t, all(1.061405429f), all(-1.453152027f));
    p = fma(t, p, all(1.421413741f));
    p = fma(t, p, all(-0.284496736f));
    p = mul(t, fma(t, p, all(0.254829592f)));
    return ior_sign(sub(all(1.0f), mul(p, exponential(sub(zero(), mul(a, a))))), x);
}

void rms_norm(const float* x, const float* w, float eps, int n, float* y) {
    F squares[4] = {zero(), zero(), zero(), zero()};
    int at = 0;
    for (; at + 64 <= n; at += 64)
        UNROLL for (int j = 0; j < 4; j++) {
            const F v = load(x + at + 16 * j);
            squares[j] = fma(v, v, squares[j]);
        }
    for (; at < n; at += 16) {
        const F v = load(x + at);
        squares[0] = fma(v, v, squares[0]);
    }
    const float total = sum(add(add(squares[0], squares[1]), add(squares[2], squares[3])));
    const F by = all(1.0f / __builtin_sqrtf(total / (float)n + eps));
    for (int i = 0; i < n; i += 16) store(y + i, mul(mul(load(x + i), by), load(w + i)));
}

// Codes and scales (max|x| / 127) of at most 16 blocks of 32, whose divisions are one vector operation.
INLINE void quantize_blocks(const float* x, int n, int8_t* codes, float* scales) {
    alignas(64) float most[16] = {}, by[16];
    for (int b = 0; b < n; b++) most[b] = highest_magnitude(load(x + 32 * b), load(x + 32 * b + 16));
    const F high = load(most);
    store(by, keep(not_less_equal(high, zero()), div(all(127.0f), high)));
    store(most, div(high, all(127.0f)));
    for (int b = 0; b < n; b++) {
        const F factor = all(by[b]);
        store_bytes(codes + 32 * b, to_int(mul(load(x + 32 * b), factor)));
        store_bytes(codes + 32 * b + 16, to_int(mul(load(x + 32 * b + 16), factor)));
        scales[b] = most[b];
    }
}

// Scaled sums of at most 8 blocks as multiples of a unit, 16 bits each. Sixteen may be read.
INLINE void round_sums(const float* sums, int n, float* unit, int16_t* units) {
    float most = 0;
    for (int i = 0; i < n; i++) most = __builtin_fabsf(sums[i]) > most ? __builtin_fabsf(sums[i]) : most;
    *unit = most / 32767.0f;
    alignas(64) int32_t rounded[16];
    istore(rounded, to_int(mul(load(sums), all(most > 0 ? 32767.0f / most : 0.0f))));
    for (int i = 0; i < n; i++) units[i] = (int16_t)rounded[i];
}

void activate_int8(const dovetail::RowArgs& args) {
    const auto [x, k_blocks, row, position, shared] = args;
    int8_t* codes = (int8_t*)row;
    float *scale = (float*)(row + (size_t)k_blocks * 32), *scaled_sum = scale + k_blocks;
    int32_t *offset = (int32_t*)(scaled_sum + k_blocks), *half_offset = offset + k_blocks;
    for (int b = 0; b < k_blocks; b += 16)
        quantize_blocks(x + 32 * b, k_blocks - b < 16 ? k_blocks - b : 16, codes + 32 * b, scale + b);
    for (int b = 0; b < k_blocks; b += 2) {  // sums of 16 codes: four per vector of 64
        alignas(64) int32_t sums[16];
        alignas(64) int8_t last[64] = {};
        const bool both_there = b + 1 < k_blocks;
        if (!both_there) __builtin_memcpy(last, codes + 32 * b, 32);
        istore(sums, sum_fours(dot_small(izero(), ball(1), iload(both_there ? codes + 32 * b : last))));
        for (int i = 0; i < (both_there ? 2 : 1); i++) {
            const int first = sums[8 * i], second = sums[8 * i + 4], total = first + second;
            scaled_sum[b + i] = scale[b + i] * (float)total, offset[b + i] = -8 * total;
            half_offset[2 * (b + i)] = -32 * first, half_offset[2 * (b + i) + 1] = -32 * second;
        }
    }
    float* unit = (float*)(half_offset + 2 * k_blocks);
    int16_t* units = (int16_t*)(unit + (k_blocks + 7) / 8);
    for (int b = 0; b < k_blocks; b += 8)
        round_sums(scaled_sum + b, k_blocks - b < 8 ? k_blocks - b : 8, unit + b / 8, units + b);
}

// Codes of 16 values times `factor`, zeros if they are not `sound`: their high and low bytes, and their sum, which is below
// 2^19 in magnitude, so that float32 holds it exactly.
INLINE int quantize_wide(F x, F factor, M sound, int8_t* high, int8_t* low) {
    const I code = to_int(keep(sound, mul(x, factor))), top = signed_right32<8>(iadd(code, iall(128)));
    store_bytes(high, top);
    store_bytes(low, signed_right32<24>(left32<24>(code)));
    return (int)sum(to_float(code));
}

// Scales are max|x| / INT16_MOST. A block whose values are all below 2^-100 counts as zeros, because the inverse of its scale
// might be no number. One with a value that is not finite has such a scale, which is enough: products become NaN.
void activate_int16(const dovetail::RowArgs& args) {
    const auto [x, k_blocks, row, position, shared] = args;
    float *scale = (float*)(row + (size_t)k_blocks * 64), *sums = scale + k_blocks;
    int32_t *offset = (int32_t*)(sums + 2 * k_blocks), *half_offset = offset + k_blocks;
    constexpr float most = (float)dovetail::INT16_MOST;
    for (int b = 0; b < k_blocks; b++) {
        const F first = load(x + 32 * b), second = load(x + 32 * b + 16), high = all(highest_magnitude(first, second));
        const F factor = div(all(most), high);
        const M sound = both(not_less_equal(high, all(0x1p-100f)), not_nan(sub(high, high)));
        int8_t* codes = (int8_t*)row + 64 * b;
        const int one = quantize_wide(first, factor, sound, codes, codes + 32);
        const int two = quantize_wide(second, factor, sound, codes + 16, codes + 48);
        scale[b] = lane(high, 0) / most, sums[2 * b] = sum(first), sums[2 * b + 1] = sum(second);
        offset[b] = -8 * (one + two), half_offset[2 * b] = -32 * one, half_offset[2 * b + 1] = -32 * two;
    }
}

void activate_exact(const dovetail::RowArgs& args) {
    const auto [x, k_blocks, row, position, shared] = args;
    float *y = (float*)row, *sums = y + (size_t)k_blocks * 32;
    for (int b = 0; b < k_blocks; b++) {
        const F lo = load(x + 32 * b), hi = load(x + 32 * b + 16);
        store(y + 32 * b, lo), store(y + 32 * b + 16, hi);
        sums[2 * b] = sum(lo), sums[2 * b + 1] = sum(hi);
    }
}

void activate_bf16(const dovetail::RowArgs& a) {
    for (int i = 0; i < 32 * a.k_blocks; i += 16) store_bf16((uint16_t*)a.row + i, load(a.x + i));
}

void to_bf16(const float* x, int n, uint16_t* y) {
    for (int i = 0; i < n; i += 16) store_bf16(y + i, load(x + i));
}

void scale_row(const float* x, float by, int n, float* y) {
    for (int i = 0; i < n; i += 16) store(y + i, mul(load(x + i), all(by)));
}

INLINE F activation(dovetail::Gate kind, F x) {
    const F one = all(1.0f);
    switch (kind) {
        case dovetail::GATE_SILU: return div(x, add(one, exponential(sub(zero(), x))));
        case dovetail::GATE_GELU: return mul(mul(x, all(0.5f)), add(one, error_function(mul(x, all(0.70710678f)))));
        case dovetail::GATE_GELU_TANH: {
            const F inner = mul(all(0.79788456f), fma(mul(mul(x, x), x), all(0.044715f), x));
            return mul(mul(x, all(0.5f)), add(one, hyperbolic_tangent(inner)));
        }
        case dovetail::GATE_RELU: return max(zero(), x);
        default: return x;
    }
}

template <dovetail::Gate KIND> void gate_rows(const dovetail::GateArgs& g) {
    for (int r = 0; r < g.rows; r++)
        for (int i = 0; i < g.n; i += 16) {
            const size_t at = (size_t)r * g.stride + i;
            store(g.out + (size_t)r * g.out_stride + i, mul(activation(KIND, load(g.gate + at)), load(g.up + at)));
        }
}
void gate(const dovetail::GateArgs& g) {
    switch (g.kind) {
        case dovetail::GATE_SILU: return gate_rows<dovetail::GATE_SILU>(g);
        case dovetail::GATE_GELU: return gate_rows<dovetail::GATE_GELU>(g);
        case dovetail::GATE_GELU_TANH: return gate_rows<dovetail::GATE_GELU_TANH>(g);
        case dovetail::GATE_RELU: return gate_rows<dovetail::GATE_RELU>(g);
        default: return gate_rows<dovetail::GATE_NONE>(g);
    }
}

// cos and sin may be read up to 15 floats past n / 2. Vectors write whole multiples of 16 in each half of y, so sizes where
// n / 2 is no such multiple take the plain loop.
void rotate(const float* x, const float* cos, const float* sin, float scale, int n, float* y) {
    const int h = n / 2;
    int i = 0;
    for (; i + 16 <= h; i += 16) {
        const F a = load(x + i), b = load(x + h + i), c = load(cos + i), s = load(sin + i), by = all(scale);
        store(y + i, mul(sub(mul(a, c), mul(b, s)), by));
        store(y + h + i, mul(add(mul(b, c), mul(a, s)), by));
    }
    for (; i < h; i++) {
        const float a = x[i], b = x[h + i];
        y[i] = (a * cos[i] - b * sin[i]) * scale;
        y[h + i] = (b * cos[i] + a * sin[i]) * scale;
    }
}

void argmax(const float* x, int n, float* best, int* index) {
    F high = all(-__builtin_inff());
    I at = izero();
    float tail = -__builtin_inff();
    int tail_at = 0, i = 0;
    for (; i + 16 <= n; i += 16) {
        const F v = load(x + i);
        const M more = not_less_equal(v, high);  // also where v is NaN, which stays because nothing exceeds it
        const M sound = not_nan(high);
        const M take = both(more, sound);
        high = choose(take, v, high), at = choose(take, iall(i), at);
    }
    for (; i < n; i++)
        if (!(x[i] <= tail) && tail == tail) tail = x[i], tail_at = i;
    int32_t lanes[16];
    istore(lanes, at);
    float most = tail;
    int where = tail_at;
    for (int l = 0; l < 16; l++) {
        const float v = lane(high, l);
        const int here = lanes[l] + l;
        if (most != most) break;
        if (v != v || v > most || (v == most && here < where)) most = v, where = here;
    }
    *best = most, *index = where;
}

inline void add_rows_of(dovetail::Kernels& k) {
    k.rms_norm = rms_norm, k.scale = scale_row, k.gate = gate, k.rotate = rotate;
    k.to_bf16 = to_bf16, k.argmax = argmax;
    k.activate[dovetail::INT8] = activate_int8, k.activate[dovetail::EXACT] = activate_exact;
    k.activate[dovetail::BFLOAT] = activate_bf16, k.activate[dovetail::INT16] = activate_int16;
}

}  // namespace
