// Sixteen lanes in one register: AVX-512 F, BW, DQ, VL and VNNI; BF16 where the compiler is told so.
#pragma once
#include <immintrin.h>
#include <stdint.h>

namespace {

typedef __m512 F;
typedef __m512i I;
typedef __mmask16 M;

constexpr int ROWS_SMALL = 4, TILES_SMALL = 3, ROWS_LARGE = 6, TILES_LARGE = 2;
constexpr int QUERIES = 6, KEY_STEP = 4, VALUE_STEP = 4;

inline F load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, F x) { _mm512_storeu_ps(p, x); }
inline F all(float x) { return _mm512_set1_ps(x); }
inline F zero() { return _mm512_setzero_ps(); }
inline F add(F a, F b) { return _mm512_add_ps(a, b); }
inline F sub(F a, F b) { return _mm512_sub_ps(a, b); }
inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
inline F div(F a, F b) { return _mm512_div_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
inline F max(F a, F b) { return _mm512_max_ps(a, b); }
inline F min(F a, F b) { return _mm512_min_ps(a, b); }
inline F magnitude(F a) { return _mm512_andnot_ps(_mm512_set1_ps(-0.f), a); }
inline F round_even(F a) { return _mm512_roundscale_ps(a, 8); }
inline F times_power_of_two(F a, F n) { return _mm512_scalef_ps(a, n); }
inline M not_less(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ); }
inline M not_less_equal(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLE_UQ); }
inline F keep(M m, F a) { return _mm512_maskz_mov_ps(m, a); }
inline F choose(M m, F a, F b) { return _mm512_mask_mov_ps(b, m, a); }

inline I iload(const void* p) { return _mm512_loadu_si512(p); }
inline void istore(void* p, I x) { _mm512_storeu_si512(p, x); }
inline I iall(int32_t x) { return _mm512_set1_epi32(x); }
inline I ball(int8_t x) { return _mm512_set1_epi8(x); }
inline I izero() { return _mm512_setzero_si512(); }
inline I iadd(I a, I b) { return _mm512_add_epi32(a, b); }
inline I iand(I a, I b) { return _mm512_and_si512(a, b); }
inline I ior(I a, I b) { return _mm512_or_si512(a, b); }
template <int N> inline I left16(I a) { return _mm512_slli_epi16(a, N); }
template <int N> inline I right16(I a) { return _mm512_srli_epi16(a, N); }
template <int N> inline I left32(I a) { return _mm512_slli_epi32(a, N); }
template <int N> inline I right32(I a) { return _mm512_srli_epi32(a, N); }
inline F to_float(I a) { return _mm512_cvtepi32_ps(a); }
inline I to_int(F a) { return _mm512_cvtps_epi32(a); }
inline F as_float(I a) { return _mm512_castsi512_ps(a); }
inline I as_int(F a) { return _mm512_castps_si512(a); }
inline I choose(M m, I a, I b) { return _mm512_mask_mov_epi32(b, m, a); }

inline F ior_sign(F a, F sign) {  // |a| is a, with the sign of the other
    return _mm512_or_ps(a, _mm512_and_ps(sign, _mm512_set1_ps(-0.f)));
}
inline M not_nan(F a) { return _mm512_cmp_ps_mask(a, a, _CMP_ORD_Q); }
inline M both(M a, M b) { return a & b; }

// The largest magnitude; NaN counts as larger than anything (as integers, the bits are in that order).
inline float highest_magnitude(F a, F b) {
    const __m512i bits = _mm512_max_epi32(as_int(magnitude(a)), as_int(magnitude(b)));
    const int most = _mm512_reduce_max_epi32(bits);
    float x;
    __builtin_memcpy(&x, &most, 4);
    return x;
}
inline F half(const void* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
inline F bf16(const void* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
inline F unsigned_bytes(const void* p) { return to_float(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p))); }
inline F signed_bytes(const void* p) { return to_float(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p))); }
inline void store_bytes(void* p, I a) { _mm_storeu_si128((__m128i*)p, _mm512_cvtsepi32_epi8(a)); }

// acc + the products of four unsigned and four signed bytes per lane. `dot_small`: the unsigned ones are below 64.
inline I dot(I acc, I u, I s) { return _mm512_dpbusd_epi32(acc, u, s); }
inline I dot_small(I acc, I u, I s) { return _mm512_dpbusd_epi32(acc, u, s); }

// acc + the products of two bfloat16 per lane, low ones first.
inline F dot_bf16(F acc, I a, I b) {
#ifdef __AVX512BF16__
    return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b);
#else
    const I top = _mm512_set1_epi32((int)0xffff0000);
    acc = fma(as_float(left32<16>(a)), as_float(left32<16>(b)), acc);
    return fma(as_float(iand(a, top)), as_float(iand(b, top)), acc);
#endif
}

// Round to nearest even, as bfloat16 in the low half of each lane; NaN stays NaN.
inline I round_bf16(F a) {
    const I x = as_int(a), odd = iand(right32<16>(x), iall(1));
    const I rounded = right32<16>(iadd(x, iadd(odd, iall(0x7fff))));
    const M nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
    return choose(nan, iall(0x7fc0), rounded);
}
inline void store_bf16(void* p, F a) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(round_bf16(a))); }

inline float lane(F a, int i) { return a[i]; }
inline void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }

// Fixed trees, the same in every instruction set: halves of 8, 4, 2, 1.
inline float sum(F a) {
    __m256 x = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
    __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_add_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}
inline float highest(F a) { return _mm512_reduce_max_ps(a); }
inline int sum(I a) { return _mm512_reduce_add_epi32(a); }

}  // namespace
