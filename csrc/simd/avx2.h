// Sixteen lanes in two registers: AVX2, FMA and F16C; AVX-VNNI where the compiler is told so.
#pragma once
#include "macros.h"

#include <immintrin.h>
#include <stdint.h>

namespace {

struct F { __m256 a, b; };
struct I { __m256i a, b; };
struct M { __m256 a, b; };
struct D { __m256d a, b; };

constexpr int ROWS_ALONE = 4, ROWS_MANY = 4, TILES_MANY = 1;
constexpr int QUERIES = 3, KEY_STEP = 1, VALUE_STEP = 1, PAGES_MANY = 1;

INLINE F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
INLINE void store(float* p, F x) { _mm256_storeu_ps(p, x.a), _mm256_storeu_ps(p + 8, x.b); }
INLINE F all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
INLINE F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
INLINE F add(F a, F b) { return {_mm256_add_ps(a.a, b.a), _mm256_add_ps(a.b, b.b)}; }
INLINE F sub(F a, F b) { return {_mm256_sub_ps(a.a, b.a), _mm256_sub_ps(a.b, b.b)}; }
INLINE F mul(F a, F b) { return {_mm256_mul_ps(a.a, b.a), _mm256_mul_ps(a.b, b.b)}; }
INLINE F div(F a, F b) { return {_mm256_div_ps(a.a, b.a), _mm256_div_ps(a.b, b.b)}; }
INLINE F fma(F a, F b, F c) { return {_mm256_fmadd_ps(a.a, b.a, c.a), _mm256_fmadd_ps(a.b, b.b, c.b)}; }
INLINE F max(F a, F b) { return {_mm256_max_ps(a.a, b.a), _mm256_max_ps(a.b, b.b)}; }
INLINE F min(F a, F b) { return {_mm256_min_ps(a.a, b.a), _mm256_min_ps(a.b, b.b)}; }
INLINE F magnitude(F a) {
    const __m256 sign = _mm256_set1_ps(-0.f);
    return {_mm256_andnot_ps(sign, a.a), _mm256_andnot_ps(sign, a.b)};
}
INLINE F round_even(F a) { return {_mm256_round_ps(a.a, 8), _mm256_round_ps(a.b, 8)}; }
INLINE M not_less(F a, F b) { return {_mm256_cmp_ps(a.a, b.a, _CMP_NLT_UQ), _mm256_cmp_ps(a.b, b.b, _CMP_NLT_UQ)}; }
INLINE M not_less_equal(F a, F b) {
    return {_mm256_cmp_ps(a.a, b.a, _CMP_NLE_UQ), _mm256_cmp_ps(a.b, b.b, _CMP_NLE_UQ)};
}
INLINE F keep(M m, F a) { return {_mm256_and_ps(m.a, a.a), _mm256_and_ps(m.b, a.b)}; }
INLINE F choose(M m, F a, F b) { return {_mm256_blendv_ps(b.a, a.a, m.a), _mm256_blendv_ps(b.b, a.b, m.b)}; }

INLINE I iload(const void* p) {
    return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)p + 1)};
}
INLINE void istore(void* p, I x) {
    _mm256_storeu_si256((__m256i*)p, x.a), _mm256_storeu_si256((__m256i*)p + 1, x.b);
}
INLINE I iall(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
INLINE I ball(int8_t x) { return {_mm256_set1_epi8(x), _mm256_set1_epi8(x)}; }
INLINE I izero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
INLINE I iadd(I a, I b) { return {_mm256_add_epi32(a.a, b.a), _mm256_add_epi32(a.b, b.b)}; }
INLINE I imax(I a, I b) { return {_mm256_max_epi32(a.a, b.a), _mm256_max_epi32(a.b, b.b)}; }
INLINE I bsub(I a, I b) { return {_mm256_sub_epi8(a.a, b.a), _mm256_sub_epi8(a.b, b.b)}; }
INLINE I iand(I a, I b) { return {_mm256_and_si256(a.a, b.a), _mm256_and_si256(a.b, b.b)}; }
INLINE I ior(I a, I b) { return {_mm256_or_si256(a.a, b.a), _mm256_or_si256(a.b, b.b)}; }
template <int N> INLINE I left16(I a) { return {_mm256_slli_epi16(a.a, N), _mm256_slli_epi16(a.b, N)}; }
template <int N> INLINE I right16(I a) { return {_mm256_srli_epi16(a.a, N), _mm256_srli_epi16(a.b, N)}; }
template <int N> INLINE I left32(I a) { return {_mm256_slli_epi32(a.a, N), _mm256_slli_epi32(a.b, N)}; }
template <int N> INLINE I right32(I a) { return {_mm256_srli_epi32(a.a, N), _mm256_srli_epi32(a.b, N)}; }
template <int N> INLINE I signed_right32(I a) { return {_mm256_srai_epi32(a.a, N), _mm256_srai_epi32(a.b, N)}; }
// The same sixteen bytes in every four lanes, and the one of them for each byte of `at`, which is below 16.
INLINE I sixteen_bytes(const uint8_t* p) {
    const __m256i x = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)p));
    return {x, x};
}
INLINE I look_up(I bytes, I at) { return {_mm256_shuffle_epi8(bytes.a, at.a), _mm256_shuffle_epi8(bytes.b, at.b)}; }
INLINE F to_float(I a) { return {_mm256_cvtepi32_ps(a.a), _mm256_cvtepi32_ps(a.b)}; }
INLINE I to_int(F a) { return {_mm256_cvtps_epi32(a.a), _mm256_cvtps_epi32(a.b)}; }
INLINE F as_float(I a) { return {_mm256_castsi256_ps(a.a), _mm256_castsi256_ps(a.b)}; }
INLINE I as_int(F a) { return {_mm256_castps_si256(a.a), _mm256_castps_si256(a.b)}; }
INLINE I choose(M m, I a, I b) { return as_int(choose(m, as_float(a), as_float(b))); }

// n is a whole number; results below the smallest normal number are not asked for.
INLINE F times_power_of_two(F a, F n) { return mul(a, as_float(left32<23>(iadd(to_int(n), iall(127))))); }
INLINE F times_power_of_two(M m, F a, F n) { return keep(m, times_power_of_two(a, keep(m, n))); }

INLINE F ior_sign(F a, F sign) {  // |a| is a, with the sign of the other
    const __m256 bit = _mm256_set1_ps(-0.f);
    return {_mm256_or_ps(a.a, _mm256_and_ps(sign.a, bit)), _mm256_or_ps(a.b, _mm256_and_ps(sign.b, bit))};
}
INLINE M not_nan(F a) { return {_mm256_cmp_ps(a.a, a.a, _CMP_ORD_Q), _mm256_cmp_ps(a.b, a.b, _CMP_ORD_Q)}; }
INLINE M both(M a, M b) { return {_mm256_and_ps(a.a, b.a), _mm256_and_ps(a.b, b.b)}; }
INLINE unsigned bits(M a) { return (unsigned)(_mm256_movemask_ps(a.a) | _mm256_movemask_ps(a.b) << 8); }

// The largest magnitude; NaN counts as larger than anything (as integers, the bits are in that order).
INLINE float highest_magnitude(F x, F y) {
    const I p = as_int(magnitude(x)), q = as_int(magnitude(y));
    const __m256i h = _mm256_max_epi32(_mm256_max_epi32(p.a, p.b), _mm256_max_epi32(q.a, q.b));
    __m128i m = _mm_max_epi32(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
    return _mm_cvtss_f32(_mm_castsi128_ps(_mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1))));
}
INLINE F half(const void* p) {
    const __m128i* h = (const __m128i*)p;
    return {_mm256_cvtph_ps(_mm_loadu_si128(h)), _mm256_cvtph_ps(_mm_loadu_si128(h + 1))};
}
// Eight numbers, each in two neighbouring lanes.
INLINE F half_pairs(const void* p) {
    const __m128i x = _mm_loadu_si128((const __m128i*)p);
    return {_mm256_cvtph_ps(_mm_unpacklo_epi16(x, x)), _mm256_cvtph_ps(_mm_unpackhi_epi16(x, x))};
}
INLINE F bf16(const void* p) {
    const __m128i* h = (const __m128i*)p;
    return as_float(left32<16>({_mm256_cvtepu16_epi32(_mm_loadu_si128(h)),
                                _mm256_cvtepu16_epi32(_mm_loadu_si128(h + 1))}));
}
INLINE I unsigned_bytes_as_ints(const void* p) {
    return {_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)),
            _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)((const char*)p + 8)))};
}
INLINE F unsigned_bytes(const void* p) { return to_float(unsigned_bytes_as_ints(p)); }
INLINE F signed_bytes(const void* p) {
    return to_float({_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)),
                     _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)((const char*)p + 8)))});
}
INLINE void store_bytes(void* p, I x) {
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xd8);
    const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packs_epi16(words, words), 0xd8);
    _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(bytes));
}
// Eight-bit floats (e4m3) as bfloat16. Exponents begin 120 lower; those without one have eighths of 2^-6.
INLINE __m256i eights_as_bf16(__m128i eights) {
    const __m256i x = _mm256_cvtepi8_epi16(eights), exponent = _mm256_and_si256(x, _mm256_set1_epi16(0x78));
    const __m256i size = _mm256_and_si256(_mm256_slli_epi16(x, 4), _mm256_set1_epi16(0x7f0));
    const __m256i normal = _mm256_add_epi16(size, _mm256_set1_epi16(0x3c00));
    const __m256i eighths = _mm256_broadcastsi128_si256(_mm_setr_epi16(0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60));
    const __m256i at = _mm256_mullo_epi16(_mm256_and_si256(x, _mm256_set1_epi16(7)), _mm256_set1_epi16(0x202));
    const __m256i tiny = _mm256_shuffle_epi8(eighths, _mm256_add_epi16(at, _mm256_set1_epi16(0x100)));
    const __m256i bits = _mm256_blendv_epi8(normal, tiny, _mm256_cmpeq_epi16(exponent, _mm256_setzero_si256()));
    return _mm256_or_si256(bits, _mm256_and_si256(x, _mm256_set1_epi16((short)0x8000)));
}
INLINE I eights_as_bf16(const void* p) {
    const __m128i* b = (const __m128i*)p;
    return {eights_as_bf16(_mm_loadu_si128(b)), eights_as_bf16(_mm_loadu_si128(b + 1))};
}
// Thirty-two unsigned bytes as 16 bits each, and (x y + 2^14) / 2^15 of such as bytes.
INLINE I bytes_as_16(const void* p) {
    const __m128i* b = (const __m128i*)p;
    return {_mm256_cvtepu8_epi16(_mm_loadu_si128(b)), _mm256_cvtepu8_epi16(_mm_loadu_si128(b + 1))};
}
INLINE void store_high(void* p, I x, I y) {
    const __m256i bytes = _mm256_packs_epi16(_mm256_mulhrs_epi16(x.a, y.a), _mm256_mulhrs_epi16(x.b, y.b));
    _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(bytes, 0xd8));
}

INLINE __m256i quads(__m256i u, __m256i s, __m256i weight) {
    return _mm256_madd_epi16(_mm256_maddubs_epi16(u, s), weight);
}
INLINE __m256i dot_small(__m256i acc, __m256i u, __m256i s) {
#ifdef __AVXVNNI__
    return _mm256_dpbusd_avx_epi32(acc, u, s);
#else
    return _mm256_add_epi32(acc, quads(u, s, _mm256_set1_epi16(1)));
#endif
}
// Two products of full bytes overflow 16 bits, so the halves of the unsigned one go separately.
INLINE __m256i dot(__m256i acc, __m256i u, __m256i s) {
#ifdef __AVXVNNI__
    return _mm256_dpbusd_avx_epi32(acc, u, s);
#else
    const __m256i low = _mm256_set1_epi8(15);
    acc = _mm256_add_epi32(acc, quads(_mm256_and_si256(u, low), s, _mm256_set1_epi16(1)));
    return _mm256_add_epi32(acc, quads(_mm256_and_si256(_mm256_srli_epi16(u, 4), low), s, _mm256_set1_epi16(16)));
#endif
}
INLINE I dot(I acc, I u, I s) { return {dot(acc.a, u.a, s.a), dot(acc.b, u.b, s.b)}; }
// acc + the products of two signed 16-bit numbers per lane.
INLINE I dot_words(I acc, I a, I b) {
    return iadd(acc, {_mm256_madd_epi16(a.a, b.a), _mm256_madd_epi16(a.b, b.b)});
}
INLINE I dot_small(I acc, I u, I s) { return {dot_small(acc.a, u.a, s.a), dot_small(acc.b, u.b, s.b)}; }

INLINE F dot_bf16(F acc, I a, I b) {
    const I top = iall((int)0xffff0000);
    acc = fma(as_float(left32<16>(a)), as_float(left32<16>(b)), acc);
    return fma(as_float(iand(a, top)), as_float(iand(b, top)), acc);
}
INLINE I round_bf16(F a) {
    const I x = as_int(a), odd = iand(right32<16>(x), iall(1));
    const I rounded = right32<16>(iadd(x, iadd(odd, iall(0x7fff))));
    const M nan = {_mm256_cmp_ps(a.a, a.a, _CMP_UNORD_Q), _mm256_cmp_ps(a.b, a.b, _CMP_UNORD_Q)};
    return choose(nan, iall(0x7fc0), rounded);
}
INLINE void store_bf16(void* p, F a) {
    const I r = round_bf16(a);
    _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(_mm256_packus_epi32(r.a, r.b), 0xd8));
}

INLINE void store_bf16_pair(void* p, F a, F b) { store_bf16(p, a), store_bf16((uint16_t*)p + 16, b); }

// Thirty-two codes as bfloat16: signed bytes; or low (H = 0) or high halves of bytes minus 8.
INLINE I bytes_as_bf16(const void* codes) {
    const I a = right32<16>(as_int(signed_bytes(codes))), b = right32<16>(as_int(signed_bytes((const char*)codes + 16)));
    return {_mm256_permute4x64_epi64(_mm256_packus_epi32(a.a, a.b), 0xd8),
            _mm256_permute4x64_epi64(_mm256_packus_epi32(b.a, b.b), 0xd8)};
}
template <int H> INLINE I fours_as_bf16(const void* codes) {
    const __m256i bytes = _mm256_loadu_si256((const __m256i*)codes), x = H ? _mm256_srli_epi16(bytes, 4) : bytes;
    const __m256i first = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, (char)0xe0, (char)0xc0, (char)0xa0, (char)0x80, 0x40, 0, (char)0x80, 0, (char)0x80, 0, 0x40,
                      (char)0x80, (char)0xa0, (char)0xc0, (char)0xe0));
    const __m256i second = _mm256_broadcastsi128_si256(
        _mm_setr_epi8((char)0xc1, (char)0xc0, (char)0xc0, (char)0xc0, (char)0xc0, (char)0xc0, (char)0xc0, (char)0xbf, 0, 0x3f,
                      0x40, 0x40, 0x40, 0x40, 0x40, 0x40));
    const __m256i at = _mm256_permute4x64_epi64(_mm256_and_si256(x, _mm256_set1_epi8(15)), 0xd8);
    const __m256i low = _mm256_shuffle_epi8(first, at), high = _mm256_shuffle_epi8(second, at);
    return {_mm256_unpacklo_epi8(low, high), _mm256_unpackhi_epi8(low, high)};
}
INLINE void pin(I&) {}
INLINE void pin(F&) {}
INLINE void prefetch_far(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T1); }  // not into the first level
INLINE void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }
INLINE float lane(F x, int i) { return i < 8 ? x.a[i] : x.b[i - 8]; }

INLINE float sum(F x) {
    const __m256 h = _mm256_add_ps(x.a, x.b);
    __m128 y = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
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
// out[r][p] = the sum of x[p][r], for R rows.
template <int P, int R> INLINE void all_sums(const F (&x)[P][4], float* const* out) {
    for (int r = 0; r < R; r++)
        for (int p = 0; p < P; p++) out[r][p] = sum(x[p][r]);
}
INLINE float highest(F x) {
    const __m256 h = _mm256_max_ps(x.a, x.b);
    __m128 y = _mm_max_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
    y = _mm_max_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
}
// best[p] = the highest of it and x[p]; a NaN is none.
template <int P> INLINE void raise(const F (&x)[P], float* best) {
    for (int p = 0; p < P; p++) best[p] = highest(max(x[p], all(best[p])));
}
INLINE __m256i sum_fours(__m256i x) {
    x = _mm256_add_epi32(x, _mm256_shuffle_epi32(x, 0xb1));
    return _mm256_add_epi32(x, _mm256_shuffle_epi32(x, 0x4e));
}
INLINE I sum_fours(I x) { return {sum_fours(x.a), sum_fours(x.b)}; }  // of each four lanes, in each of them

// Sums in float64, for terms whose sums are exact there: their order differs between instruction sets.
INLINE D dzero() { return {_mm256_setzero_pd(), _mm256_setzero_pd()}; }
INLINE __m256d wide(__m256 x) {
    return _mm256_add_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(x)), _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1)));
}
INLINE D dadd(D a, F b) { return {_mm256_add_pd(a.a, wide(b.a)), _mm256_add_pd(a.b, wide(b.b))}; }
INLINE double sum(D a) {
    const __m256d x = _mm256_add_pd(a.a, a.b);
    const __m128d y = _mm_add_pd(_mm256_castpd256_pd128(x), _mm256_extractf128_pd(x, 1));
    return _mm_cvtsd_f64(_mm_add_sd(y, _mm_unpackhi_pd(y, y)));
}

}  // namespace
