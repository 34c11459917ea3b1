// Sixteen lanes in plain C++. It runs on any CPU and says most simply what the others compute.
#pragma once
#include "macros.h"

#include <math.h>
#include <stdint.h>
#include <string.h>

namespace {

struct F { float v[16]; };
struct I { int32_t v[16]; };
struct M { bool v[16]; };
struct D { double v[16]; };

constexpr int ROWS_ALONE = 1, ROWS_MANY = 1, TILES_MANY = 1;
constexpr int QUERIES = 1, KEY_STEP = 1, VALUE_STEP = 1, PAGES_MANY = 1;

#define LANES(type, expression) \
    type r;                     \
    for (int i = 0; i < 16; i++) r.v[i] = expression; \
    return r
INLINE F load(const float* p) { LANES(F, p[i]); }
INLINE void store(float* p, F x) { memcpy(p, x.v, 64); }
INLINE F all(float x) { LANES(F, x); }
INLINE F zero() { LANES(F, 0); }
INLINE F add(F a, F b) { LANES(F, a.v[i] + b.v[i]); }
INLINE F sub(F a, F b) { LANES(F, a.v[i] - b.v[i]); }
INLINE F mul(F a, F b) { LANES(F, a.v[i] * b.v[i]); }
INLINE F div(F a, F b) { LANES(F, a.v[i] / b.v[i]); }
INLINE F fma(F a, F b, F c) { LANES(F, __builtin_fmaf(a.v[i], b.v[i], c.v[i])); }
INLINE F max(F a, F b) { LANES(F, a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
INLINE F min(F a, F b) { LANES(F, a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
INLINE F magnitude(F a) { LANES(F, __builtin_fabsf(a.v[i])); }
INLINE F round_even(F a) { LANES(F, __builtin_rintf(a.v[i])); }
INLINE M not_less(F a, F b) { LANES(M, !(a.v[i] < b.v[i])); }
INLINE M not_less_equal(F a, F b) { LANES(M, !(a.v[i] <= b.v[i])); }
INLINE F keep(M m, F a) { LANES(F, m.v[i] ? a.v[i] : 0); }
INLINE F choose(M m, F a, F b) { LANES(F, m.v[i] ? a.v[i] : b.v[i]); }

INLINE I iload(const void* p) { I r; memcpy(r.v, p, 64); return r; }
INLINE void istore(void* p, I x) { memcpy(p, x.v, 64); }
INLINE I iall(int32_t x) { LANES(I, x); }
INLINE I ball(int8_t x) { LANES(I, (int32_t)((uint8_t)x * 0x01010101u)); }
INLINE I izero() { LANES(I, 0); }
INLINE I iadd(I a, I b) { LANES(I, (int32_t)((uint32_t)a.v[i] + (uint32_t)b.v[i])); }
INLINE I imax(I a, I b) { LANES(I, a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
INLINE I iand(I a, I b) { LANES(I, a.v[i] & b.v[i]); }
INLINE I ior(I a, I b) { LANES(I, a.v[i] | b.v[i]); }
template <int N> INLINE I left32(I a) { LANES(I, (int32_t)((uint32_t)a.v[i] << N)); }
template <int N> INLINE I right32(I a) { LANES(I, (int32_t)((uint32_t)a.v[i] >> N)); }
template <int N> INLINE I signed_right32(I a) { LANES(I, a.v[i] >> N); }
// The same sixteen bytes in every four lanes, and the one of them for each byte of `at`, which is below 16.
INLINE I sixteen_bytes(const uint8_t* p) {
    I r;
    for (int i = 0; i < 4; i++) memcpy(r.v + 4 * i, p, 16);
    return r;
}
INLINE I look_up(I bytes, I at) {
    uint8_t b[64];
    memcpy(b, at.v, 64);
    for (uint8_t& x : b) x = ((const uint8_t*)bytes.v)[x];
    I r;
    memcpy(r.v, b, 64);
    return r;
}
template <int N> INLINE I left16(I a) {
    LANES(I, (int32_t)((((uint32_t)a.v[i] & 0xffffu) << N & 0xffffu) | (((uint32_t)a.v[i] & 0xffff0000u) << N)));
}
template <int N> INLINE I right16(I a) {
    LANES(I, (int32_t)((((uint32_t)a.v[i] & 0xffffu) >> N) | (((uint32_t)a.v[i] >> 16 >> N) << 16)));
}
INLINE F to_float(I a) { LANES(F, (float)a.v[i]); }
INLINE I to_int(F a) { LANES(I, (int32_t)__builtin_rintf(a.v[i])); }
INLINE F as_float(I a) { F r; memcpy(r.v, a.v, 64); return r; }
INLINE I as_int(F a) { I r; memcpy(r.v, a.v, 64); return r; }
INLINE I choose(M m, I a, I b) { LANES(I, m.v[i] ? a.v[i] : b.v[i]); }
INLINE F times_power_of_two(F a, F n) { LANES(F, a.v[i] * __builtin_ldexpf(1.f, (int)n.v[i])); }
INLINE F times_power_of_two(M m, F a, F n) { return keep(m, times_power_of_two(a, keep(m, n))); }

INLINE F ior_sign(F a, F sign) { LANES(F, __builtin_copysignf(a.v[i], sign.v[i])); }
INLINE M not_nan(F a) { LANES(M, a.v[i] == a.v[i]); }
INLINE M both(M a, M b) { LANES(M, a.v[i] && b.v[i]); }
INLINE unsigned bits(M a) {
    unsigned r = 0;
    for (int i = 0; i < 16; i++) r |= (unsigned)a.v[i] << i;
    return r;
}

// The largest magnitude; NaN counts as larger than anything (as integers, the bits are in that order).
INLINE float highest_magnitude(F a, F b) {
    const I p = as_int(magnitude(a)), q = as_int(magnitude(b));
    int32_t most = 0;
    for (int i = 0; i < 16; i++) {
        most = p.v[i] > most ? p.v[i] : most;
        most = q.v[i] > most ? q.v[i] : most;
    }
    float x;
    memcpy(&x, &most, 4);
    return x;
}
INLINE float half_to_float(uint16_t h) {
    const uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 1023;
    if (exponent == 0) {
        const float tiny = (float)fraction * 0x1p-24f;
        return sign ? -tiny : tiny;
    }
    const uint32_t bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | fraction << 13;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
INLINE float bf16_to_float(uint16_t h) {
    const uint32_t bits = (uint32_t)h << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
INLINE F half(const void* p) { uint16_t h[16]; memcpy(h, p, 32); LANES(F, half_to_float(h[i])); }
// Eight numbers, each in two neighbouring lanes.
INLINE F half_pairs(const void* p) { uint16_t h[8]; memcpy(h, p, 16); LANES(F, half_to_float(h[i / 2])); }
INLINE F bf16(const void* p) { uint16_t h[16]; memcpy(h, p, 32); LANES(F, bf16_to_float(h[i])); }
INLINE I unsigned_bytes_as_ints(const void* p) { LANES(I, ((const uint8_t*)p)[i]); }
INLINE F unsigned_bytes(const void* p) { LANES(F, (float)((const uint8_t*)p)[i]); }
INLINE F signed_bytes(const void* p) { LANES(F, (float)((const int8_t*)p)[i]); }
INLINE void store_bytes(void* p, I a) {
    for (int i = 0; i < 16; i++) ((int8_t*)p)[i] = (int8_t)(a.v[i] > 127 ? 127 : a.v[i] < -128 ? -128 : a.v[i]);
}
// An 8-bit float (e4m3) as bfloat16. Exponents begin 120 lower; those without one have eighths of 2^-6.
INLINE uint32_t eight_as_bf16(uint32_t x) {
    const uint16_t eighths[8] = {0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60};
    return (x & 0x80) << 8 | (x & 0x78 ? ((x & 0x7f) << 4) + 0x3c00 : eighths[x & 7]);
}
INLINE I eights_as_bf16(const void* p) {
    LANES(I, (int32_t)(eight_as_bf16(((const uint8_t*)p)[2 * i]) | eight_as_bf16(((const uint8_t*)p)[2 * i + 1]) << 16));
}
// Thirty-two unsigned bytes as 16 bits each, and (x y + 2^14) / 2^15 of such as bytes.
INLINE I bytes_as_16(const void* p) { LANES(I, (int)((const uint8_t*)p)[2 * i] | (int)((const uint8_t*)p)[2 * i + 1] << 16); }
INLINE void store_high(void* p, I x, I y) {
    for (int i = 0; i < 32; i++) {
        const int a = (int16_t)((uint32_t)x.v[i / 2] >> i % 2 * 16), b = (int16_t)((uint32_t)y.v[i / 2] >> i % 2 * 16);
        ((int8_t*)p)[i] = (int8_t)((a * b + (1 << 14)) >> 15);
    }
}

INLINE I dot(I acc, I u, I s) {
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 4; j++)
            acc.v[i] = (int32_t)((uint32_t)acc.v[i] +  // modulo 2^32, as the instruction
                                 (uint32_t)((int)((uint32_t)u.v[i] >> 8 * j & 255) * (int)(int8_t)((uint32_t)s.v[i] >> 8 * j & 255)));
    return acc;
}
INLINE I dot_small(I acc, I u, I s) { return dot(acc, u, s); }
// acc + the products of two signed 16-bit numbers per lane.
INLINE I dot_words(I acc, I a, I b) {
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 32; j += 16) acc.v[i] += (int16_t)((uint32_t)a.v[i] >> j) * (int16_t)((uint32_t)b.v[i] >> j);
    return acc;
}
INLINE F dot_bf16(F acc, I a, I b) {
    const I top = iall((int)0xffff0000);
    acc = fma(as_float(left32<16>(a)), as_float(left32<16>(b)), acc);
    return fma(as_float(iand(a, top)), as_float(iand(b, top)), acc);
}
INLINE I round_bf16(F a) {
    I r;
    for (int i = 0; i < 16; i++) {
        uint32_t x;
        memcpy(&x, &a.v[i], 4);
        r.v[i] = a.v[i] != a.v[i] ? 0x7fc0 : (int32_t)((x + (x >> 16 & 1) + 0x7fff) >> 16);
    }
    return r;
}
INLINE void store_bf16(void* p, F a) {
    const I r = round_bf16(a);
    for (int i = 0; i < 16; i++) ((uint16_t*)p)[i] = (uint16_t)r.v[i];
}

INLINE void store_bf16_pair(void* p, F a, F b) { store_bf16(p, a), store_bf16((uint16_t*)p + 16, b); }

// Thirty-two codes as bfloat16: signed bytes; or low (H = 0) or high halves of bytes minus 8.
template <class Value> INLINE I as_bf16(const void* codes, const Value& value) {
    uint16_t found[32];
    for (int i = 0; i < 32; i++) {
        const float x = value(((const uint8_t*)codes)[i]);
        uint32_t b;
        memcpy(&b, &x, 4);
        found[i] = (uint16_t)(b >> 16);
    }
    return iload(found);
}
INLINE I bytes_as_bf16(const void* codes) {
    return as_bf16(codes, [](uint8_t c) { return (float)(int8_t)c; });
}
template <int H> INLINE I fours_as_bf16(const void* codes) {
    return as_bf16(codes, [](uint8_t c) { return (float)((c >> 4 * H & 15) - 8); });
}

INLINE void pin(I&) {}
INLINE void pin(F&) {}
INLINE void prefetch_far(const void* p) { __builtin_prefetch(p, 0, 2); }  // not into the first level
INLINE void prefetch(const void* p) { __builtin_prefetch(p); }
INLINE float lane(F x, int i) { return x.v[i]; }
INLINE float sum(F x) {
    for (int n = 8; n > 0; n /= 2)
        for (int i = 0; i < n; i++) x.v[i] += x.v[i + n];
    return x.v[0];
}
// best[p] = the highest of it and the sums of x[p]; a NaN is none.
template <int P> INLINE void best_sums(const F (&x)[P][4], float* best) {
    for (int p = 0; p < P; p++)
        for (int r = 0; r < 4; r++) {
            const float s = sum(x[p][r]);
            best[p] = s > best[p] ? s : best[p];
        }
}
// out[r][p] = the sum of x[p][r], for R rows.
template <int P, int R> INLINE void all_sums(const F (&x)[P][4], float* const* out) {
    for (int r = 0; r < R; r++)
        for (int p = 0; p < P; p++) out[r][p] = sum(x[p][r]);
}
INLINE float highest(F x) {
    float m = x.v[0];
    for (int i = 1; i < 16; i++) m = x.v[i] > m ? x.v[i] : m;
    return m;
}
// best[p] = the highest of it and x[p]; a NaN is none.
template <int P> INLINE void raise(const F (&x)[P], float* best) {
    for (int p = 0; p < P; p++) best[p] = highest(max(x[p], all(best[p])));
}
INLINE I sum_fours(I x) {  // of each four lanes, in each of them
    LANES(I, x.v[i / 4 * 4] + x.v[i / 4 * 4 + 1] + x.v[i / 4 * 4 + 2] + x.v[i / 4 * 4 + 3]);
}

// Sums in float64, for terms whose sums are exact there: their order differs between instruction sets.
INLINE D dzero() { LANES(D, 0); }
INLINE D dadd(D a, F b) { LANES(D, a.v[i] + (double)b.v[i]); }
INLINE double sum(D x) {
    double s = 0;
    for (int i = 0; i < 16; i++) s += x.v[i];
    return s;
}
#undef LANES

}  // namespace
