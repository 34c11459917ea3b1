// Sixteen lanes in one register: AVX-512 F, BW, DQ, VL and VNNI; BF16 where the compiler is told so.
#pragma once
#include "macros.h"

#include <immintrin.h>
#include <stdint.h>

namespace {

typedef __m512 F;
typedef __m512i I;
typedef __mmask16 M;
struct D { __m512d a, b; };

constexpr int ROWS_ALONE = 8, ROWS_MANY = 6, TILES_MANY = 2;
constexpr int QUERIES = 6, KEY_STEP = 4, VALUE_STEP = 4, PAGES_MANY = 4;

INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
INLINE void store(float* p, F x) { _mm512_storeu_ps(p, x); }
INLINE F all(float x) { return _mm512_set1_ps(x); }
INLINE F zero() { return _mm512_setzero_ps(); }
INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
INLINE F div(F a, F b) { return _mm512_div_ps(a, b); }
INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }
INLINE F min(F a, F b) { return _mm512_min_ps(a, b); }
INLINE F magnitude(F a) { return _mm512_andnot_ps(_mm512_set1_ps(-0.f), a); }
INLINE F round_even(F a) { return _mm512_roundscale_ps(a, 8); }
INLINE F times_power_of_two(F a, F n) { return _mm512_scalef_ps(a, n); }
// a 2^n, n a whole number, or 0 where the mask is not set. Results below the smallest normal number are not asked for.
INLINE F times_power_of_two(M m, F a, F n) { return _mm512_maskz_scalef_ps(m, a, n); }
INLINE M not_less(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ); }
INLINE M not_less_equal(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLE_UQ); }
INLINE F keep(M m, F a) { return _mm512_maskz_mov_ps(m, a); }
INLINE F choose(M m, F a, F b) { return _mm512_mask_mov_ps(b, m, a); }

INLINE I iload(const void* p) { return _mm512_loadu_si512(p); }
INLINE void istore(void* p, I x) { _mm512_storeu_si512(p, x); }
INLINE I iall(int32_t x) { return _mm512_set1_epi32(x); }
INLINE I ball(int8_t x) { return _mm512_set1_epi8(x); }
INLINE I izero() { return _mm512_setzero_si512(); }
INLINE I iadd(I a, I b) { return _mm512_add_epi32(a, b); }
INLINE I imax(I a, I b) { return _mm512_max_epi32(a, b); }
INLINE I bsub(I a, I b) { return _mm512_sub_epi8(a, b); }
INLINE I iand(I a, I b) { return _mm512_and_si512(a, b); }
INLINE I ior(I a, I b) { return _mm512_or_si512(a, b); }
template <int N> INLINE I left16(I a) { return _mm512_slli_epi16(a, N); }
template <int N> INLINE I right16(I a) { return _mm512_srli_epi16(a, N); }
template <int N> INLINE I left32(I a) { return _mm512_slli_epi32(a, N); }
template <int N> INLINE I right32(I a) { return _mm512_srli_epi32(a, N); }
template <int N> INLINE I signed_right32(I a) { return _mm512_srai_epi32(a, N); }
// The same sixteen bytes in every four lanes, and the one of them for each byte of `at`, which is below 16.
INLINE I sixteen_bytes(const uint8_t* p) { return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)p)); }
INLINE I look_up(I bytes, I at) { return _mm512_shuffle_epi8(bytes, at); }
INLINE F to_float(I a) { return _mm512_cvtepi32_ps(a); }
INLINE I to_int(F a) { return _mm512_cvtps_epi32(a); }
INLINE F as_float(I a) { return _mm512_castsi512_ps(a); }
INLINE I as_int(F a) { return _mm512_castps_si512(a); }
INLINE I choose(M m, I a, I b) { return _mm512_mask_mov_epi32(b, m, a); }

INLINE F ior_sign(F a, F sign) {  // |a| is a, with the sign of the other
    return _mm512_or_ps(a, _mm512_and_ps(sign, _mm512_set1_ps(-0.f)));
}
INLINE M not_nan(F a) { return _mm512_cmp_ps_mask(a, a, _CMP_ORD_Q); }
INLINE M both(M a, M b) { return a & b; }
INLINE unsigned bits(M a) { return a; }

// The largest magnitude; NaN counts as larger than anything (as integers, the bits are in that order).
INLINE float highest_magnitude(F a, F b) {
    const __m512i bits = _mm512_max_epi32(as_int(magnitude(a)), as_int(magnitude(b)));
    const int most = _mm512_reduce_max_epi32(bits);
    float x;
    __builtin_memcpy(&x, &most, 4);
    return x;
}
INLINE F half(const void* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
// Eight numbers, each in two neighbouring lanes.
INLINE F half_pairs(const void* p) {
    const __m128i x = _mm_loadu_si128((const __m128i*)p);
    return _mm512_cvtph_ps(_mm256_set_m128i(_mm_unpackhi_epi16(x, x), _mm_unpacklo_epi16(x, x)));
}
INLINE F bf16(const void* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
INLINE I unsigned_bytes_as_ints(const void* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)); }
INLINE F unsigned_bytes(const void* p) { return to_float(unsigned_bytes_as_ints(p)); }
INLINE F signed_bytes(const void* p) { return to_float(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p))); }
INLINE void store_bytes(void* p, I a) { _mm_storeu_si128((__m128i*)p, _mm512_cvtsepi32_epi8(a)); }
// Thirty-two 8-bit floats (e4m3) as bfloat16. Exponents begin 120 lower; those without one have eighths of 2^-6.
INLINE I eights_as_bf16(const void* p) {
    const I x = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p));
    const I size = _mm512_and_si512(_mm512_slli_epi16(x, 4), _mm512_set1_epi16(0x7f0));
    const __mmask32 tiny = _mm512_testn_epi16_mask(x, _mm512_set1_epi16(0x78));
    const I eighths = _mm512_castsi128_si512(_mm_setr_epi16(0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60));
    const I bits = _mm512_mask_permutexvar_epi16(_mm512_add_epi16(size, _mm512_set1_epi16(0x3c00)), tiny, x, eighths);
    return _mm512_ternarylogic_epi32(bits, x, _mm512_set1_epi16((short)0x8000), 0xf8);  // bits | (x & sign)
}
// Thirty-two unsigned bytes as 16 bits each, and (x y + 2^14) / 2^15 of such as bytes.
INLINE I bytes_as_16(const void* p) { return _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)p)); }
INLINE void store_high(void* p, I x, I y) {
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtsepi16_epi8(_mm512_mulhrs_epi16(x, y)));
}

// acc + the products of four unsigned and four signed bytes per lane. `dot_small`: the unsigned ones are below 64.
INLINE I dot(I acc, I u, I s) { return _mm512_dpbusd_epi32(acc, u, s); }
INLINE I dot_small(I acc, I u, I s) { return _mm512_dpbusd_epi32(acc, u, s); }
// acc + the products of two signed 16-bit numbers per lane.
INLINE I dot_words(I acc, I a, I b) { return _mm512_dpwssd_epi32(acc, a, b); }

// acc + the products of two bfloat16 per lane, low ones first.
INLINE F dot_bf16(F acc, I a, I b) {
#ifdef __AVX512BF16__
    return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b);
#else
    const I top = _mm512_set1_epi32((int)0xffff0000);
    acc = fma(as_float(left32<16>(a)), as_float(left32<16>(b)), acc);
    return fma(as_float(iand(a, top)), as_float(iand(b, top)), acc);
#endif
}

// Round to nearest even, as bfloat16 in the low half of each lane; NaN stays NaN.
INLINE I round_bf16(F a) {
    const I x = as_int(a), odd = iand(right32<16>(x), iall(1));
    const I rounded = right32<16>(iadd(x, iadd(odd, iall(0x7fff))));
    const M nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
    return choose(nan, iall(0x7fc0), rounded);
}
INLINE void store_bf16(void* p, F a) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(round_bf16(a))); }

INLINE float lane(F a, int i) { return a[i]; }
// Thirty-two values. The instruction flushes what is below the smallest normal number to zero.
INLINE void store_bf16_pair(void* p, F a, F b) {
#ifdef __AVX512BF16__
    istore(p, (I)_mm512_cvtne2ps_pbh(b, a));
#else
    store_bf16(p, a), store_bf16((uint16_t*)p + 16, b);
#endif
}

// Thirty-two codes as bfloat16: signed bytes; or low (H = 0) or high halves of bytes minus 8.
INLINE I bytes_as_bf16(const void* codes) {
    const F a = signed_bytes(codes), b = signed_bytes((const char*)codes + 16);
#ifdef __AVX512BF16__
    return (I)_mm512_cvtne2ps_pbh(b, a);
#else
    const __m256i low = _mm512_cvtepi32_epi16(right32<16>(as_int(a))), high = _mm512_cvtepi32_epi16(right32<16>(as_int(b)));
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
#endif
}
template <int H> INLINE I fours_as_bf16(const void* codes) {
    const I w = bytes_as_16(codes);
    const __m256i half = _mm256_setr_epi16((short)0xc100, (short)0xc0e0, (short)0xc0c0, (short)0xc0a0, (short)0xc080,
                                           (short)0xc040, (short)0xc000, (short)0xbf80, 0, 0x3f80, 0x4000, 0x4040, 0x4080,
                                           0x40a0, 0x40c0, 0x40e0);
    const I table = _mm512_broadcast_i64x4(half);  // twice, because five bits are looked up
    return _mm512_permutexvar_epi16(H ? right16<4>(w) : w, table);
}

INLINE void pin(I& x) { __asm__("" : "+v"(x)); }  // stays in its register instead of being loaded again
INLINE void pin(F& x) { __asm__("" : "+v"(x)); }
INLINE void prefetch_far(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T1); }  // not into the first level
INLINE void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }

// Fixed trees, the same in every instruction set: halves of 8, 4, 2, 1.
INLINE float sum(F a) {
    __m256 x = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
    __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_add_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}
// best[p] = the highest of it and the sums of x[p]; a NaN is none.
template <int P> INLINE void best_sums(const F (&x)[P][4], float* best) {
    for (int p = 0; p < P; p++)
        for (int r = 0; r < 4; r++) {
            const float s = sum(x[p][r]);
            best[p] = s > best[p] ? s : best[p];
        }
}
INLINE F sixteen_sums(const F (&x)[4][4]) {  // in the order of `sum`; lane 4 r + p: of x[p][r]
    F fours[4], twos[2];
    UNROLL for (int p = 0; p < 4; p++) {
        const F *y = x[p], a = add(_mm512_shuffle_f32x4(y[0], y[1], 0x44), _mm512_shuffle_f32x4(y[0], y[1], 0xee)),
                b = add(_mm512_shuffle_f32x4(y[2], y[3], 0x44), _mm512_shuffle_f32x4(y[2], y[3], 0xee));
        fours[p] = add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    }
    UNROLL for (int i = 0; i < 2; i++) {
        const __m512d a = _mm512_castps_pd(fours[2 * i]), b = _mm512_castps_pd(fours[2 * i + 1]);
        twos[i] = add(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    return add(_mm512_shuffle_ps(twos[0], twos[1], 0x88), _mm512_shuffle_ps(twos[0], twos[1], 0xdd));
}
template <> INLINE void best_sums<4>(const F (&x)[4][4], float* best) {
    const F sums = sixteen_sums(x);
    __m128 most = _mm_loadu_ps(best);
    most = _mm_max_ps(_mm512_castps512_ps128(sums), most);
    most = _mm_max_ps(_mm512_extractf32x4_ps(sums, 1), most);
    most = _mm_max_ps(_mm512_extractf32x4_ps(sums, 2), most);
    _mm_storeu_ps(best, _mm_max_ps(_mm512_extractf32x4_ps(sums, 3), most));
}
// out[r][p] = the sum of x[p][r], for R rows.
template <int P, int R> INLINE void all_sums(const F (&x)[P][4], float* const* out) {
    if constexpr (P == 4) {
        const F sums = sixteen_sums(x);
        _mm_storeu_ps(out[0], _mm512_castps512_ps128(sums));
        if (R > 1) _mm_storeu_ps(out[1], _mm512_extractf32x4_ps(sums, 1));
        if (R > 2) _mm_storeu_ps(out[2], _mm512_extractf32x4_ps(sums, 2));
        if (R > 3) _mm_storeu_ps(out[3], _mm512_extractf32x4_ps(sums, 3));
    } else {
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int p = 0; p < P; p++) out[r][p] = sum(x[p][r]);
    }
}
INLINE float highest(F a) { return _mm512_reduce_max_ps(a); }
// best[p] = the highest of it and x[p]; a NaN is none.
template <int P> INLINE void raise(const F (&x)[P], float* best) {
    for (int p = 0; p < P; p++) best[p] = highest(max(x[p], all(best[p])));
}
template <> INLINE void raise<4>(const F (&x)[4], float* best) {
    const F a = max(_mm512_shuffle_f32x4(x[0], x[1], 0x44), _mm512_shuffle_f32x4(x[0], x[1], 0xee)),
            b = max(_mm512_shuffle_f32x4(x[2], x[3], 0x44), _mm512_shuffle_f32x4(x[2], x[3], 0xee));
    F c = max(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));  // four lanes of each
    c = max(c, _mm512_permute_ps(c, 0x4e));
    c = max(c, _mm512_permute_ps(c, 0xb1));
    const __m128 most = _mm512_castps512_ps128(_mm512_permutexvar_ps(_mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0), c));
    _mm_storeu_ps(best, _mm_max_ps(most, _mm_loadu_ps(best)));
}
INLINE I sum_fours(I a) {  // of each four lanes, in each of them
    a = iadd(a, _mm512_shuffle_epi32(a, (_MM_PERM_ENUM)0xb1));
    return iadd(a, _mm512_shuffle_epi32(a, (_MM_PERM_ENUM)0x4e));
}

// Sums in float64, for terms whose sums are exact there: their order differs between instruction sets.
INLINE D dzero() { return {_mm512_setzero_pd(), _mm512_setzero_pd()}; }
INLINE D dadd(D a, F b) {
    return {_mm512_add_pd(a.a, _mm512_cvtps_pd(_mm512_castps512_ps256(b))),
            _mm512_add_pd(a.b, _mm512_cvtps_pd(_mm512_extractf32x8_ps(b, 1)))};
}
INLINE double sum(D a) { return _mm512_reduce_add_pd(_mm512_add_pd(a.a, a.b)); }

}  // namespace
