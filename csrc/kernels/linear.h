// Products of activation rows and packed weight tiles. Each output has one sequence of operations, whatever the register
// block: blocks of 32 in order of K, and in each an exact integer sum (or a fixed float sequence), then one or two fused
// multiply-adds. So a row's result depends neither on the other rows nor on the instruction set.
//
// Scales of K formats are integers times one float of their super-block. So a block's integer sum times its integer scale
// is exact, one fused multiply-add with the row's scale adds it to the super-block's sum, and the float of the super-block
// comes last. Minima times the row's sums are one integer sum of the super-block: the row has its scaled sums in 16 bits too.
#pragma once
#include "../kernels.h"

namespace {

using dovetail::GemmArgs;

// ---- packed codes: `low(g)` and `high(g)` are the operands of k-quads g and g + 4, g in 0..3

INLINE I nibble_low(I v) { return iand(v, ball(15)); }
INLINE I nibble_high(I v) { return iand(right16<4>(v), ball(15)); }

template <int G> INLINE I fifth_low(I h) {  // bit G of each byte, as 16
    return iand(left16<4 - G>(h), ball(16));
}
template <int G> INLINE I fifth_high(I h) {  // bit G + 4
    return iand(G ? right16<G>(h) : h, ball(16));
}

struct Nibbles {
    static constexpr bool SMALL = true;
    static constexpr int CODES = 256;
    const uint8_t* p;
    INLINE void open(const uint8_t* at) { p = at; }
    template <int G> INLINE void operands(I& low, I& high) const {
        const I v = iload(p + 64 * G);
        low = nibble_low(v), high = nibble_high(v);
    }
};

struct FiveBits {
    static constexpr bool SMALL = true;
    static constexpr int CODES = 320;
    const uint8_t* p;
    I top;
    INLINE void open(const uint8_t* at) { p = at, top = iload(at + 256); }
    template <int G> INLINE void operands(I& low, I& high) const {
        const I v = iload(p + 64 * G);
        low = ior(nibble_low(v), fifth_low<G>(top)), high = ior(nibble_high(v), fifth_high<G>(top));
    }
};

struct SixBits {
    static constexpr bool SMALL = true;
    static constexpr int CODES = 384;
    const uint8_t* p;
    I first, second;  // bits 4 and 5 of k-quads 0 to 3, and 4 to 7
    INLINE void open(const uint8_t* at) { p = at, first = iload(at + 256), second = iload(at + 320); }
    template <int G> static INLINE I bits(I v) {
        const I moved = G == 0 ? left16<4>(v) : G == 1 ? left16<2>(v) : G == 2 ? v : right16<2>(v);
        return iand(moved, ball(0x30));
    }
    template <int G> INLINE void operands(I& low, I& high) const {
        const I v = iload(p + 64 * G);
        low = ior(nibble_low(v), bits<G>(first)), high = ior(nibble_high(v), bits<G>(second));
    }
};

struct TwoBits {
    static constexpr bool SMALL = true;
    static constexpr int CODES = 128;
    I first, second;  // k-quads 0 to 3, and 4 to 7
    INLINE void open(const uint8_t* at) { first = iload(at), second = iload(at + 64); }
    template <int G> static INLINE I bits(I v) { return iand(G ? right16<2 * G>(v) : v, ball(3)); }
    template <int G> INLINE void operands(I& low, I& high) const { low = bits<G>(first), high = bits<G>(second); }
};

struct ThreeBits : TwoBits {
    static constexpr int CODES = 192;
    I top;
    INLINE void open(const uint8_t* at) { TwoBits::open(at), top = iload(at + 128); }
    template <int G> INLINE void operands(I& low, I& high) const {
        const I moved = G < 2 ? left16<G < 2 ? 2 - G : 0>(top) : G == 3 ? right16<1>(top) : top;
        low = ior(bits<G>(first), iand(moved, ball(4)));
        high = ior(bits<G>(second), iand(right16<2 + G>(top), ball(4)));
    }
};

// Codes of 4 bits are numbers of levels.
template <const uint8_t (&LEVELS)[16], bool IS_SMALL> struct Levels {
    static constexpr bool SMALL = IS_SMALL;
    static constexpr int CODES = 256;
    const uint8_t* p;
    I levels;
    INLINE void open(const uint8_t* at) { p = at, levels = sixteen_bytes(LEVELS); }
    template <int G> INLINE void operands(I& low, I& high) const {
        const I v = iload(p + 64 * G);
        low = look_up(levels, nibble_low(v)), high = look_up(levels, nibble_high(v));
    }
};

struct Bytes {
    static constexpr bool SMALL = false;
    static constexpr int CODES = 512;
    const uint8_t* p;
    INLINE void open(const uint8_t* at) { p = at; }
    template <int G> INLINE void operands(I& low, I& high) const { low = iload(p + 64 * G), high = iload(p + 256 + 64 * G); }
};

// ---- formats: codes, zero point, and the scale and minimum of a block, or of each of its halves

template <class C, int FORMAT, int ZERO_POINT, bool HAS_MIN> struct Simple : C {
    static constexpr int ID = FORMAT, ZERO = ZERO_POINT;
    static constexpr bool MIN = HAS_MIN, HALVES = false;
    static INLINE F scale(const uint8_t*, const uint8_t* block) { return half(block + C::CODES); }
    static INLINE F minimum(const uint8_t*, const uint8_t* block) { return half(block + C::CODES + 32); }
};
// 2^(e - 128) * (twice the value), for every e of 8 bits: the product of two powers that are normal numbers.
struct WMXFP4 : Levels<dovetail::MXFP4_LEVELS, true> {
    static constexpr int ID = dovetail::MXFP4, ZERO = 16;
    static constexpr bool MIN = false, HALVES = false;
    static INLINE F scale(const uint8_t*, const uint8_t* block) {
        const I e = unsigned_bytes_as_ints(block + CODES), low = right32<1>(e), high = iadd(low, iand(e, iall(1)));
        const I bias = iall(63);
        return mul(as_float(left32<23>(iadd(low, bias))), as_float(left32<23>(iadd(high, bias))));
    }
};
// d * (scale of 32 values), minus dmin * (minimum of 32)
template <class C, int FORMAT> struct AffineK : C {
    static constexpr int ID = FORMAT, ZERO = 0;
    static constexpr bool MIN = true, HALVES = false;
    static INLINE F whole_scale(const uint8_t* block) { return unsigned_bytes(block + C::CODES); }
    static INLINE I whole_minimum(const uint8_t* block) { return unsigned_bytes_as_ints(block + C::CODES + 16); }
    static INLINE F scale(const uint8_t* head, const uint8_t* block) { return mul(half(head), whole_scale(block)); }
    static INLINE F minimum(const uint8_t* head, const uint8_t* block) {
        return sub(zero(), mul(half(head + 32), unsigned_bytes(block + C::CODES + 16)));
    }
};
// d * (signed scale of 32 values, or of 16)
template <class C, int FORMAT, int ZERO_POINT, bool HAS_HALVES> struct SignedK : C {
    static constexpr int ID = FORMAT, ZERO = ZERO_POINT;
    static constexpr bool MIN = false, HALVES = HAS_HALVES;
    static INLINE F whole_scale(const uint8_t* block) { return signed_bytes(block + C::CODES); }
    static INLINE F whole_scale_high(const uint8_t* block) { return signed_bytes(block + C::CODES + 16); }
    static INLINE F scale(const uint8_t* head, const uint8_t* block) { return mul(half(head), whole_scale(block)); }
    static INLINE F scale_high(const uint8_t* head, const uint8_t* block) {
        return mul(half(head), whole_scale_high(block));
    }
};
// d * (scale of 16 values), minus dmin * (minimum of 16); both share a byte
struct WQ2_K : TwoBits {
    static constexpr int ID = dovetail::Q2_K, ZERO = 0;
    static constexpr bool MIN = true, HALVES = true;
    static INLINE F low_half(const uint8_t* p) { return to_float(iand(unsigned_bytes_as_ints(p), iall(15))); }
    static INLINE F high_half(const uint8_t* p) { return to_float(right32<4>(unsigned_bytes_as_ints(p))); }
    static INLINE F whole_scale(const uint8_t* block) { return low_half(block + CODES); }
    static INLINE F whole_scale_high(const uint8_t* block) { return low_half(block + CODES + 16); }
    static INLINE F whole_minimum(const uint8_t* block) { return high_half(block + CODES); }
    static INLINE F whole_minimum_high(const uint8_t* block) { return high_half(block + CODES + 16); }
    static INLINE F scale(const uint8_t* head, const uint8_t* block) { return mul(half(head), whole_scale(block)); }
    static INLINE F scale_high(const uint8_t* head, const uint8_t* block) {
        return mul(half(head), whole_scale_high(block));
    }
    static INLINE F minimum(const uint8_t* head, const uint8_t* block) {
        return sub(zero(), mul(half(head + 32), whole_minimum(block)));
    }
    static INLINE F minimum_high(const uint8_t* head, const uint8_t* block) {
        return sub(zero(), mul(half(head + 32), whole_minimum_high(block)));
    }
};

using WQ4_0 = Simple<Nibbles, dovetail::Q4_0, 8, false>;
using WQ4_1 = Simple<Nibbles, dovetail::Q4_1, 0, true>;
using WQ5_0 = Simple<FiveBits, dovetail::Q5_0, 16, false>;
using WQ5_1 = Simple<FiveBits, dovetail::Q5_1, 0, true>;
using WQ8_0 = Simple<Bytes, dovetail::Q8_0, 128, false>;
using WIQ4_NL = Simple<Levels<dovetail::IQ4_LEVELS, false>, dovetail::IQ4_NL, 128, false>;
using WQ4_K = AffineK<Nibbles, dovetail::Q4_K>;
using WQ5_K = AffineK<FiveBits, dovetail::Q5_K>;
using WQ6_K = SignedK<SixBits, dovetail::Q6_K, 32, true>;
using WQ3_K = SignedK<ThreeBits, dovetail::Q3_K, 4, true>;
using WIQ4_XS = SignedK<Levels<dovetail::IQ4_LEVELS, false>, dovetail::IQ4_XS, 128, false>;

template <class W> constexpr dovetail::FormatInfo INFO = dovetail::FORMATS[W::ID];

// Minima times a row's float sums of the halves of a block, added to f.
template <class W> INLINE F add_minima(const uint8_t* head, const uint8_t* block, float first, float second, F f) {
    if constexpr (!W::HALVES) return fma(W::minimum(head, block), all(first + second), f);
    else return fma(W::minimum_high(head, block), all(second), fma(W::minimum(head, block), all(first), f));
}

// ZERO times a number that is given as UNIT times it; both are powers of two.
template <int ZERO, int UNIT> INLINE I times_zero_point(I x) {
    constexpr int shift = __builtin_ctz(ZERO) - __builtin_ctz(UNIT);
    if constexpr (shift < 0) return signed_right32<-shift>(x);
    else if constexpr (shift > 0) return left32<shift>(x);
    else return x;
}

template <class W> INLINE I products(I acc, I weights, int32_t quad) {
    return W::SMALL ? dot_small(acc, weights, iall(quad)) : dot(acc, weights, iall(quad));
}

// ---- int8 activations

// Where block b of each row is: one pointer per array and one offset per row. Separate pointers would need a register for
// each row and array.
template <int R> struct Int8Rows {
    const uint8_t *codes, *scale, *scaled_sum, *offset, *half_offset, *unit, *units;
    size_t at[R];
    INLINE void open(const GemmArgs& g) {
        const size_t n = (size_t)g.k_blocks;
        codes = g.rows, scale = codes + n * 32, scaled_sum = scale + n * 4;
        offset = scaled_sum + n * 4, half_offset = offset + n * 4;
        unit = half_offset + n * 8, units = unit + (n + 7) / 8 * 4;
        UNROLL for (int r = 0; r < R; r++) {
            at[r] = r * g.row_stride;
            if (r) hold(at[r]);
        }
    }
    INLINE void next() { codes += 32, scale += 4, scaled_sum += 4, offset += 4, half_offset += 8; }
    INLINE int32_t quad(int r, int i) const { return *(const int32_t*)(codes + at[r] + 4 * i); }
    INLINE F scales(int r) const { return all(*(const float*)(scale + at[r])); }
    INLINE F sums(int r) const { return all(*(const float*)(scaled_sum + at[r])); }
    // Of half a block: -32 times the sum of its codes.
    INLINE I half_sum(int r, int half) const { return iall(*(const int32_t*)(half_offset + 4 * half + at[r])); }
    // Of a super-block: the unit of its scaled sums, and a pair of them as 16-bit multiples of it.
    INLINE F sum_unit(int r, int super) const { return all(*(const float*)(unit + at[r] + 4 * super)); }
    INLINE I sum_pair(int r, int block) const { return iall(*(const int32_t*)(units + at[r] + 2 * block)); }
};

template <class W, int R> INLINE I start(const Int8Rows<R>& rows, int r, int half) {
    if constexpr (W::ZERO == 0) return izero();
    else if constexpr (W::HALVES) return times_zero_point<W::ZERO, 32>(rows.half_sum(r, half));
    else return times_zero_point<W::ZERO, 8>(iall(*(const int32_t*)(rows.offset + rows.at[r])));
}

template <class W, int R, int T, int G>
INLINE void quads_int8(const W (&w)[T], const Int8Rows<R>& rows, I (&low)[R][T], I (&high)[R][T]) {
    I a[T], c[T];
    UNROLL for (int t = 0; t < T; t++) w[t].template operands<G>(a[t], c[t]);
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int t = 0; t < T; t++) low[r][t] = products<W>(low[r][t], a[t], rows.quad(r, G));
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int t = 0; t < T; t++) {
            I& acc = W::HALVES || R * T == 1 ? high[r][t] : low[r][t];
            acc = products<W>(acc, c[t], rows.quad(r, G + 4));
        }
}

// The integer sums of a block: of the whole, or of its halves.
template <class W, int R, int T>
INLINE void sums_int8(const uint8_t* const (&at)[T], const Int8Rows<R>& rows, I (&low)[R][T], I (&high)[R][T]) {
    W w[T];
    UNROLL for (int t = 0; t < T; t++) w[t].open(at[t]);
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int t = 0; t < T; t++) {
            low[r][t] = start<W>(rows, r, 0);
            high[r][t] = W::HALVES ? start<W>(rows, r, 1) : izero();
        }
    quads_int8<W, R, T, 0>(w, rows, low, high);
    quads_int8<W, R, T, 1>(w, rows, low, high);
    quads_int8<W, R, T, 2>(w, rows, low, high);
    quads_int8<W, R, T, 3>(w, rows, low, high);
    if (!W::HALVES && R * T == 1) low[0][0] = iadd(low[0][0], high[0][0]);
}

template <class W, int R, int T>
INLINE void block_int8(const uint8_t* const (&at)[T], const Int8Rows<R>& rows, F (&f)[R][T]) {
    I low[R][T], high[R][T];
    sums_int8<W, R, T>(at, rows, low, high);
    UNROLL for (int t = 0; t < T; t++) {
        const F d = W::scale(at[t], at[t]);
        UNROLL for (int r = 0; r < R; r++) {
            f[r][t] = fma(to_float(low[r][t]), mul(d, rows.scales(r)), f[r][t]);
            if constexpr (W::MIN) f[r][t] = fma(W::minimum(at[t], at[t]), rows.sums(r), f[r][t]);
        }
    }
}

// A block of a K format. Its integer sums times its integer scales are below 2^24, so float32 holds them exactly.
template <class W, int R, int T>
INLINE void block_of_super(const uint8_t* const (&at)[T], const Int8Rows<R>& rows, F (&f)[R][T]) {
    I low[R][T], high[R][T];
    sums_int8<W, R, T>(at, rows, low, high);
    UNROLL for (int t = 0; t < T; t++) {
        const F d = W::whole_scale(at[t]);
        UNROLL for (int r = 0; r < R; r++) {
            F total = mul(to_float(low[r][t]), d);
            if constexpr (W::HALVES) total = fma(to_float(high[r][t]), W::whole_scale_high(at[t]), total);
            f[r][t] = fma(total, rows.scales(r), f[r][t]);
        }
    }
}

// Integer minima of the halves of a block times -32 times the rows' sums of codes, exact as well, times the rows' scales.
template <class W, int R, int T>
INLINE void minima_of_halves(const uint8_t* const (&at)[T], const Int8Rows<R>& rows, F (&f)[R][T]) {
    UNROLL for (int t = 0; t < T; t++)
        UNROLL for (int r = 0; r < R; r++) {
            const F total = mul(to_float(rows.half_sum(r, 0)), W::whole_minimum(at[t]));
            f[r][t] = fma(fma(to_float(rows.half_sum(r, 1)), W::whole_minimum_high(at[t]), total), rows.scales(r), f[r][t]);
        }
}

// Integer minima of two blocks, side by side in each lane.
template <class W> INLINE I pair_of_minima(const uint8_t* block) {
    return ior(W::whole_minimum(block), left32<16>(W::whole_minimum(block + INFO<W>.block)));
}

// Integer minima times the rows' sums in 16 bits: an exact integer sum over a super-block.
template <class W, int R, int T>
INLINE void minima_of_super(const uint8_t* const (&head)[T], const Int8Rows<R>& rows, int super, F (&f)[R][T]) {
    constexpr auto info = INFO<W>;
    I sum[R][T];
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int t = 0; t < T; t++) sum[r][t] = izero();
    UNROLL for (int b = 0; b < info.blocks; b += 2)
        UNROLL for (int t = 0; t < T; t++) {
            const I pair = pair_of_minima<W>(head[t] + info.head + b * info.block);
            UNROLL for (int r = 0; r < R; r++)
                sum[r][t] = dot_words(sum[r][t], pair, rows.sum_pair(r, super * info.blocks + b));
        }
    UNROLL for (int t = 0; t < T; t++) {
        const F d = sub(zero(), half(head[t] + 32));
        UNROLL for (int r = 0; r < R; r++)
            f[r][t] = fma(to_float(sum[r][t]), mul(d, rows.sum_unit(r, super)), f[r][t]);
    }
}

INLINE void fetch(const GemmArgs& g, int b) {
    const uint8_t* from = g.ahead + (size_t)b * g.lines * 64;
    for (int i = 0; i < g.lines; i++) prefetch(from + 64 * i);
}

template <int R, int T> INLINE void put(const GemmArgs& g, const F (&f)[R][T]) {
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int t = 0; t < T; t++) {
            float* to = g.out + (size_t)r * g.out_stride + 16 * t;
            store(to, g.add ? add(load(to), f[r][t]) : f[r][t]);
        }
}

template <class W, int R, int T>
void gemm_blocks(const GemmArgs& g) {
    constexpr auto info = INFO<W>;
    F f[R][T];
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int t = 0; t < T; t++) f[r][t] = zero();
    Int8Rows<R> rows;
    rows.open(g);
    for (int b = 0; b < g.k_blocks; b++, rows.next()) {
        const uint8_t* at[T];
        UNROLL for (int t = 0; t < T; t++) at[t] = g.weights + t * g.tile_stride + (size_t)b * info.block;
        fetch(g, b);
        block_int8<W, R, T>(at, rows, f);
    }
    put<R, T>(g, f);
}

template <class W, int R, int T>
void gemm_super_blocks(const GemmArgs& g) {
    constexpr auto info = INFO<W>;
    F f[R][T];
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int t = 0; t < T; t++) f[r][t] = zero();
    Int8Rows<R> rows;
    rows.open(g);
    const uint8_t* head[T];
    UNROLL for (int t = 0; t < T; t++) head[t] = g.weights + t * g.tile_stride;
    for (int super = 0; super < g.k_blocks / info.blocks; super++) {
        F sums[R][T], minima[R][T];
        const uint8_t* at[T];
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int t = 0; t < T; t++) sums[r][t] = minima[r][t] = zero();
        UNROLL for (int t = 0; t < T; t++) at[t] = head[t] + info.head;
        ROLLED for (int b = 0; b < info.blocks; b++, rows.next()) {
            fetch(g, super * info.blocks + b);
            block_of_super<W, R, T>(at, rows, sums);
            if constexpr (W::MIN && W::HALVES) minima_of_halves<W, R, T>(at, rows, minima);
            UNROLL for (int t = 0; t < T; t++) at[t] += info.block;
        }
        UNROLL for (int t = 0; t < T; t++) {
            const F d = half(head[t]);
            UNROLL for (int r = 0; r < R; r++) f[r][t] = fma(sums[r][t], d, f[r][t]);
            if constexpr (W::MIN && W::HALVES) {
                const F minus = mul(half(head[t] + 32), all(0.03125f));
                UNROLL for (int r = 0; r < R; r++) f[r][t] = fma(minima[r][t], minus, f[r][t]);
            }
        }
        if constexpr (W::MIN && !W::HALVES) minima_of_super<W, R, T>(head, rows, super, f);
        UNROLL for (int t = 0; t < T; t++) head[t] += info.head + info.blocks * info.block;
    }
    put<R, T>(g, f);
}

template <class W, int R, int T>
void gemm_int8(const GemmArgs& g) {
    if constexpr (INFO<W>.blocks > 1) gemm_super_blocks<W, R, T>(g);
    else gemm_blocks<W, R, T>(g);
}

// ---- int16 activations: codes 256 high + low. One fixed sequence of operations for all formats
//
// No sum leaves 32 bits. A weight less its zero point is at most 128 in magnitude (8 bits; 15, 31 and 32 with 4, 5 and 6), a
// code at most INT16_MOST = 32639, and there are 32 of them: 32 * 128 * 32639 = 133,689,344. Before zero points are taken
// off, a weight is at most 255: 32 * 255 * 32639 = 266,334,240. Of high bytes alone, times 256, it is no more.

template <int R> struct Int16Rows {
    const uint8_t *codes, *scale, *sum, *offset, *half_offset;
    size_t at[R];
    INLINE void open(const GemmArgs& g) {
        const size_t n = (size_t)g.k_blocks;
        codes = g.rows, scale = codes + n * 64, sum = scale + n * 4, offset = sum + n * 8, half_offset = offset + n * 4;
        UNROLL for (int r = 0; r < R; r++) {
            at[r] = r * g.row_stride;
            if (r) hold(at[r]);
        }
    }
    INLINE void next() { codes += 64, scale += 4, sum += 8, offset += 4, half_offset += 8; }
    INLINE int32_t quad(int r, int i) const { return *(const int32_t*)(codes + at[r] + 4 * i); }
    INLINE F scales(int r) const { return all(*(const float*)(scale + at[r])); }
    INLINE float half_sum(int r, int half) const { return *(const float*)(sum + 4 * half + at[r]); }
    // Minus the sum of a block's codes, as values.
    INLINE float minus_sum(int r) const {
        return (float)*(const int32_t*)(offset + at[r]) * 0.125f * *(const float*)(scale + at[r]);
    }
    // The zero point times minus the sum of the codes: of the block, or of half of it.
    template <class W> INLINE I start(int r, int half) const {
        if constexpr (W::ZERO == 0) return izero();
        else if constexpr (W::HALVES)
            return times_zero_point<W::ZERO, 32>(iall(*(const int32_t*)(half_offset + 4 * half + at[r])));
        else return times_zero_point<W::ZERO, 8>(iall(*(const int32_t*)(offset + at[r])));
    }
};

// k-quad `quad` of the rows times weights: high and low bytes apart.
template <class W, int R> INLINE void quad_int16(I weights, const Int16Rows<R>& rows, int quad, I (&high)[R], I (&low)[R]) {
    UNROLL for (int r = 0; r < R; r++) {
        high[r] = products<W>(high[r], weights, rows.quad(r, quad));
        low[r] = products<W>(low[r], weights, rows.quad(r, 8 + quad));
    }
}
enum Part { FIRST, SECOND, WHOLE };  // of a block
template <class W, int R, Part PART, int G>
INLINE void quads_int16(const W& w, const Int16Rows<R>& rows, I (&high)[R], I (&low)[R]) {
    I a, c;
    w.template operands<G>(a, c);
    if (PART != SECOND) quad_int16<W, R>(a, rows, G, high, low);
    if (PART != FIRST) quad_int16<W, R>(c, rows, G + 4, high, low);
}
template <class W, int R, Part PART> INLINE void add_int16(const W& w, const Int16Rows<R>& rows, F d, F (&f)[R][1]) {
    I high[R], low[R];
    UNROLL for (int r = 0; r < R; r++) high[r] = izero(), low[r] = rows.template start<W>(r, PART == SECOND);
    quads_int16<W, R, PART, 0>(w, rows, high, low), quads_int16<W, R, PART, 1>(w, rows, high, low);
    quads_int16<W, R, PART, 2>(w, rows, high, low), quads_int16<W, R, PART, 3>(w, rows, high, low);
    UNROLL for (int r = 0; r < R; r++)
        f[r][0] = fma(to_float(iadd(left32<8>(high[r]), low[r])), mul(d, rows.scales(r)), f[r][0]);
}

template <class W, int R>
void gemm_int16(const GemmArgs& g) {
    constexpr auto info = INFO<W>;
    F f[R][1];
    UNROLL for (int r = 0; r < R; r++) f[r][0] = zero();
    Int16Rows<R> rows;
    rows.open(g);
    const uint8_t *head = g.weights, *at = head + info.head;
    for (int b = 0, left = info.blocks; b < g.k_blocks; b++, rows.next()) {
        fetch(g, b);
        W w;
        w.open(at);
        if constexpr (W::HALVES) {
            add_int16<W, R, FIRST>(w, rows, W::scale(head, at), f);
            add_int16<W, R, SECOND>(w, rows, W::scale_high(head, at), f);
        } else {
            add_int16<W, R, WHOLE>(w, rows, W::scale(head, at), f);
        }
        if constexpr (W::MIN) {
            UNROLL for (int r = 0; r < R; r++)
                f[r][0] = add_minima<W>(head, at, rows.half_sum(r, 0), rows.half_sum(r, 1), f[r][0]);
        }
        at += info.block;
        if (--left == 0) left = info.blocks, head = at, at += info.head;
    }
    put<R, 1>(g, f);
}

// ---- float32 activations against the same codes: nothing is rounded but the float32 sums

template <class W, int R, int T, int B>
INLINE void quad_exact(const I (&codes)[T], const float* const (&x)[R], int k, F (&sums)[R][T]) {
    UNROLL for (int t = 0; t < T; t++) {
        const I byte = iand(B ? right32<8 * B>(codes[t]) : codes[t], iall(255));
        const F w = sub(to_float(byte), all((float)W::ZERO));
        UNROLL for (int r = 0; r < R; r++) sums[r][t] = fma(w, all(x[r][k + B]), sums[r][t]);
    }
}
template <class W, int R, int T>
INLINE void quad_exact(const I (&codes)[T], const float* const (&x)[R], int k, F (&sums)[R][T]) {
    quad_exact<W, R, T, 0>(codes, x, k, sums), quad_exact<W, R, T, 1>(codes, x, k, sums);
    quad_exact<W, R, T, 2>(codes, x, k, sums), quad_exact<W, R, T, 3>(codes, x, k, sums);
}
template <class W, int R, int T, int G>
INLINE void quads_exact(const W* w, const float* const (&x)[R], int k, F (&low)[R][T], F (&high)[R][T]) {
    I a[T], c[T];
    UNROLL for (int t = 0; t < T; t++) w[t].template operands<G>(a[t], c[t]);
    quad_exact<W, R, T>(a, x, k + 4 * G, low);
    quad_exact<W, R, T>(c, x, k + 4 * G + 16, high);
}

template <class W, int R, int T>
void gemm_exact(const GemmArgs& g) {
    constexpr auto info = INFO<W>;
    F f[R][T];
    const float *x[R], *x_sum[R];
    UNROLL for (int r = 0; r < R; r++) {
        x[r] = (const float*)(g.rows + r * g.row_stride), x_sum[r] = x[r] + (size_t)g.k_blocks * 32;
        UNROLL for (int t = 0; t < T; t++) f[r][t] = zero();
    }
    for (int b = 0; b < g.k_blocks; b++) {
        fetch(g, b);
        UNROLL for (int t = 0; t < T; t++) {
            const uint8_t* head =
                g.weights + t * g.tile_stride + (size_t)(b / info.blocks) * (info.head + info.blocks * info.block);
            const uint8_t* at = head + info.head + (b % info.blocks) * info.block;
            F low[R][1], high[R][1];
            UNROLL for (int r = 0; r < R; r++) low[r][0] = high[r][0] = zero();
            W w[1];
            w[0].open(at);
            quads_exact<W, R, 1, 0>(w, x, 32 * b, low, high), quads_exact<W, R, 1, 1>(w, x, 32 * b, low, high);
            quads_exact<W, R, 1, 2>(w, x, 32 * b, low, high), quads_exact<W, R, 1, 3>(w, x, 32 * b, low, high);
            UNROLL for (int r = 0; r < R; r++) {
                const float first = x_sum[r][2 * b], second = x_sum[r][2 * b + 1];
                f[r][t] = fma(low[r][0], W::scale(head, at), f[r][t]);
                if constexpr (W::HALVES) f[r][t] = fma(high[r][0], W::scale_high(head, at), f[r][t]);
                else f[r][t] = fma(high[r][0], W::scale(head, at), f[r][t]);
                if constexpr (W::MIN) f[r][t] = add_minima<W>(head, at, first, second, f[r][t]);
            }
        }
    }
    put<R, T>(g, f);
}

// ---- unquantized weights

struct WF32 {
    static constexpr int ID = dovetail::F32;
    static INLINE F at(const uint8_t* p, int k) { return load((const float*)p + 16 * k); }
};
struct WF16 {
    static constexpr int ID = dovetail::F16;
    static INLINE F at(const uint8_t* p, int k) { return half(p + 32 * k); }
};

template <class W, int R, int T>
void gemm_wide(const GemmArgs& g) {
    F f[R][T];
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int t = 0; t < T; t++) f[r][t] = zero();
    for (int k = 0; k < 32 * g.k_blocks; k++) {
        F w[T];
        if (k % 32 < g.lines) prefetch(g.ahead + ((size_t)(k / 32) * g.lines + k % 32) * 64);
        UNROLL for (int t = 0; t < T; t++) w[t] = W::at(g.weights + t * g.tile_stride, k);
        UNROLL for (int r = 0; r < R; r++) {
            const F x = all(((const float*)(g.rows + r * g.row_stride))[k]);
            UNROLL for (int t = 0; t < T; t++) f[r][t] = fma(w[t], x, f[r][t]);
        }
    }
    put<R, T>(g, f);
}

// bfloat16 weights are stored as [K / 2][16][2]. With float32 rows both halves are widened. With bfloat16 rows two products
// at a time are added to the float32 sum.
template <bool WIDE, int R, int T>
void gemm_bf16(const GemmArgs& g) {
    F f[R][T];
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int t = 0; t < T; t++) f[r][t] = zero();
    for (int k = 0; k < 16 * g.k_blocks; k++) {
        I w[T];
        if (k % 16 < g.lines) prefetch(g.ahead + ((size_t)(k / 16) * g.lines + k % 16) * 64);
        UNROLL for (int t = 0; t < T; t++) w[t] = iload(g.weights + t * g.tile_stride + (size_t)64 * k);
        UNROLL for (int r = 0; r < R; r++) {
            if (WIDE) {
                const float* x = (const float*)(g.rows + r * g.row_stride) + 2 * k;
                UNROLL for (int t = 0; t < T; t++) {
                    f[r][t] = fma(as_float(left32<16>(w[t])), all(x[0]), f[r][t]);
                    f[r][t] = fma(as_float(iand(w[t], iall((int)0xffff0000))), all(x[1]), f[r][t]);
                }
            } else {
                const I x = iall(((const int32_t*)(g.rows + r * g.row_stride))[k]);
                UNROLL for (int t = 0; t < T; t++) f[r][t] = dot_bf16(f[r][t], w[t], x);
            }
        }
    }
    put<R, T>(g, f);
}

// ---- the table

constexpr int MOST_ROWS = ROWS_ALONE > ROWS_MANY ? ROWS_ALONE : ROWS_MANY;

// Formats of super-blocks keep sums of one beside those of a row, and levels take longer to look up: more rows by one tile
// suit them better.
template <class W>
constexpr bool TALLER = (INFO<W>.blocks > 1 || W::ID == dovetail::IQ4_NL || W::ID == dovetail::MXFP4) && ROWS_ALONE > ROWS_MANY;

template <class W, int R, int T> void add_codes(dovetail::Kernels& k) {
    if constexpr (T == 1 || !TALLER<W>) k.gemm[W::ID][dovetail::INT8][R][T] = gemm_int8<W, R, T>;
    if constexpr (TALLER<W>) k.many[W::ID][dovetail::INT8] = {ROWS_ALONE, 1};
    if constexpr (T == 1) {
        k.gemm[W::ID][dovetail::EXACT][R][T] = gemm_exact<W, R, T>;
        k.gemm[W::ID][dovetail::INT16][R][T] = gemm_int16<W, R>;
    }
    k.many[W::ID][dovetail::EXACT] = k.many[W::ID][dovetail::INT16] = {MOST_ROWS, 1};
}
template <int R, int T> void add_block(dovetail::Kernels& k) {
    add_codes<WQ4_0, R, T>(k), add_codes<WQ4_1, R, T>(k), add_codes<WQ5_0, R, T>(k), add_codes<WQ5_1, R, T>(k);
    add_codes<WQ8_0, R, T>(k), add_codes<WQ4_K, R, T>(k), add_codes<WQ5_K, R, T>(k), add_codes<WQ6_K, R, T>(k);
    add_codes<WQ2_K, R, T>(k), add_codes<WQ3_K, R, T>(k), add_codes<WIQ4_NL, R, T>(k), add_codes<WIQ4_XS, R, T>(k);
    add_codes<WMXFP4, R, T>(k);
    k.gemm[dovetail::F32][dovetail::EXACT][R][T] = gemm_wide<WF32, R, T>;
    k.gemm[dovetail::F16][dovetail::EXACT][R][T] = gemm_wide<WF16, R, T>;
    k.gemm[dovetail::BF16][dovetail::EXACT][R][T] = gemm_bf16<true, R, T>;
    k.gemm[dovetail::BF16][dovetail::BFLOAT][R][T] = gemm_bf16<false, R, T>;
}
template <int T, int MOST, int R = 1> void add_rows(dovetail::Kernels& k) {
    add_block<R, T>(k);
    if constexpr (R < MOST) add_rows<T, MOST, R + 1>(k);
}
inline void add_linear(dovetail::Kernels& k) {
    k.rows_alone = ROWS_ALONE;
    for (auto& format : k.many)
        for (dovetail::BlockShape& shape : format) shape = {ROWS_MANY, TILES_MANY};
    add_rows<1, MOST_ROWS>(k);
    if constexpr (TILES_MANY >= 2) add_rows<2, ROWS_MANY>(k);
    if constexpr (TILES_MANY >= 3) add_rows<3, ROWS_MANY>(k);
}

}  // namespace
