// Products of weights on uniform grids (I8, I4, F8), whose scales belong to columns or to groups of a column.
//
// With a row's int8 codes under one scale, a group's sum is an exact integer, which needs one conversion and one fused
// multiply-add with the group's scale; without groups, the sum over all of K is one integer. The column's factor and the
// row's scale come last. As everywhere, each output has one sequence of operations.
#pragma once
#include "linear.h"

namespace {

// Codes of a block, and what their zero point (8 or 128) is in units of 8.
struct GridBytes : Bytes { static constexpr int ID = dovetail::I8, ZERO = 128, EIGHTS = 16; static constexpr bool HALVES = false; };
struct GridNibbles : Nibbles { static constexpr int ID = dovetail::I4, ZERO = 8, EIGHTS = 1; static constexpr bool HALVES = false; };

// A tile of weights: where its parts are. All scales are fetched before the first block, so that memory is read as one
// stream. Processors do not follow two streams so well, one of which has a line where the other has many.
struct GridTile {
    const uint8_t *scales, *zeros, *blocks;
    INLINE void open(const GemmArgs& g, int t) {
        const uint8_t* tile = g.weights + t * g.tile_stride;
        scales = tile + 64, zeros = tile + dovetail::grid_zeros(g.k_blocks, g.grid);
        blocks = tile + dovetail::grid_blocks(g.k_blocks, g.grid);
        for (const uint8_t* p = scales; p < blocks; p += 64) prefetch(p);
    }
    INLINE F scale(int group) const { return half(scales + 32 * group); }
    INLINE F zero(int group) const { return signed_bytes(zeros + 16 * group); }
};

INLINE int group_blocks(const GemmArgs& g) { return g.grid.group ? g.grid.group : g.k_blocks; }

// The number of the group of one block after the other.
struct GroupOf {
    int size, left, number = 0;
    explicit INLINE GroupOf(const GemmArgs& g) : size(group_blocks(g)), left(size) {}
    INLINE void next() {
        if (--left == 0) number++, left = size;
    }
};

// The sums times the columns' factors, and the rows' scales if they have one at `scale`.
template <int R, int T> INLINE void put_scaled(const GemmArgs& g, F (&f)[R][T], const uint8_t* scale) {
    UNROLL for (int t = 0; t < T; t++) {
        const F factor = load((const float*)(g.weights + t * g.tile_stride));
        UNROLL for (int r = 0; r < R; r++) {
            f[r][t] = mul(f[r][t], factor);
            if (scale) f[r][t] = mul(f[r][t], all(*(const float*)(scale + r * g.row_stride)));
        }
    }
    put<R, T>(g, f);
}

// ---- rows of int8 codes under one scale

template <int R> struct TokenRows {
    const uint8_t* codes;  // of the next block
    const int32_t* eights;  // -8 * sum of the codes before the next group
    size_t at[R];
    INLINE void open(const GemmArgs& g, size_t scales) {  // bytes between the codes and their sums
        codes = g.rows, eights = (const int32_t*)(g.rows + (size_t)g.k_blocks * 32 + scales);
        UNROLL for (int r = 0; r < R; r++) {
            at[r] = r * g.row_stride;
            if (r) hold(at[r]);
        }
    }
    INLINE I quad(int r, int i) const { return iall(*(const int32_t*)(codes + at[r] + 4 * i)); }
    INLINE int32_t sum(int r, int blocks) const {  // -8 * sum of the next group's codes
        const int32_t* p = (const int32_t*)((const uint8_t*)eights + at[r]);
        return p[blocks] - p[0];
    }
};

template <class W, int R, int T, int G>
INLINE void quads_token(const W (&w)[T], const TokenRows<R>& rows, I (&low)[R][T], I (&high)[R][T]) {
    I a[T], c[T];
    UNROLL for (int t = 0; t < T; t++) w[t].template operands<G>(a[t], c[t]);
    UNROLL for (int r = 0; r < R; r++) {
        const I x = rows.quad(r, G);
        UNROLL for (int t = 0; t < T; t++) low[r][t] = W::SMALL ? dot_small(low[r][t], a[t], x) : dot(low[r][t], a[t], x);
    }
    UNROLL for (int r = 0; r < R; r++) {
        const I x = rows.quad(r, G + 4);
        UNROLL for (int t = 0; t < T; t++) {
            I& acc = R * T <= 2 ? high[r][t] : low[r][t];  // with few sums, two chains for each
            acc = W::SMALL ? dot_small(acc, c[t], x) : dot(acc, c[t], x);
        }
    }
}

// The integer sums of `count` blocks from `first` on, after zero points of 8 or 128 were taken off.
template <class W, int R, int T>
INLINE void sums_token(const GemmArgs& g, const GridTile (&tiles)[T], int first, int count, TokenRows<R>& rows, I (&sums)[R][T]) {
    I high[R][T];
    UNROLL for (int r = 0; r < R; r++) {
        const I start = iall(W::EIGHTS * rows.sum(r, count));
        UNROLL for (int t = 0; t < T; t++) sums[r][t] = start, high[r][t] = izero();
    }
    ROLLED for (int b = first; b < first + count; b++, rows.codes += 32) {
        W w[T];
        fetch(g, b);
        UNROLL for (int t = 0; t < T; t++) w[t].open(tiles[t].blocks + (size_t)b * W::CODES);
        quads_token<W, R, T, 0>(w, rows, sums, high), quads_token<W, R, T, 1>(w, rows, sums, high);
        quads_token<W, R, T, 2>(w, rows, sums, high), quads_token<W, R, T, 3>(w, rows, sums, high);
    }
    if (R * T <= 2)
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int t = 0; t < T; t++) sums[r][t] = iadd(sums[r][t], high[r][t]);
}

template <class W, int R, int T> void gemm_token(const GemmArgs& g) {
    const int group = group_blocks(g);
    GridTile tiles[T];
    F f[R][T];
    I sums[R][T];
    TokenRows<R> rows;
    UNROLL for (int t = 0; t < T; t++) tiles[t].open(g, t);
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int t = 0; t < T; t++) f[r][t] = zero();
    rows.open(g, 4);
    for (int b = 0, i = 0; b < g.k_blocks; b += group, i++) {
        sums_token<W, R, T>(g, tiles, b, group, rows, sums);
        UNROLL for (int t = 0; t < T; t++) {
            const F d = g.grid.group ? tiles[t].scale(i) : all(1.0f);
            UNROLL for (int r = 0; r < R; r++) {
                if (g.grid.zeros) {  // -8 * sum / 8, times the zero point: exact
                    const F zero = mul(tiles[t].zero(i), all(0.125f));
                    sums[r][t] = iadd(sums[r][t], to_int(mul(zero, all((float)rows.sum(r, group)))));
                }
                f[r][t] = fma(to_float(sums[r][t]), d, f[r][t]);
            }
        }
        rows.eights += group;
    }
    put_scaled<R, T>(g, f, g.rows + (size_t)g.k_blocks * 32);
}

// ---- Atom: groups of 4-bit codes on both sides, and outliers of 8 bits at the end; a scale for each group and row

// A group's sum times the scale of its columns and that of the row's group.
template <int R, int T>
INLINE void add_scaled(const I (&sums)[R][T], const F (&d)[T], const TokenRows<R>& rows, const uint8_t* scale, F (&f)[R][T]) {
    UNROLL for (int r = 0; r < R; r++) {
        const F s = all(*(const float*)(scale + rows.at[r]));
        UNROLL for (int t = 0; t < T; t++) f[r][t] = fma(to_float(sums[r][t]), mul(d[t], s), f[r][t]);
    }
}

template <int R, int T> void gemm_atom(const GemmArgs& g) {
    const int group = g.grid.group, narrow = g.k_blocks - g.grid.outliers;
    const uint8_t *scales[T], *row_scale = g.rows + (size_t)g.k_blocks * 32;
    GridTile tiles[T];
    F f[R][T], d[T];
    I sums[R][T];
    TokenRows<R> rows;
    rows.open(g, (size_t)g.k_blocks * 4);
    UNROLL for (int t = 0; t < T; t++) {
        tiles[t].blocks = g.weights + t * g.tile_stride;
        scales[t] = tiles[t].blocks + dovetail::atom_codes(g.k_blocks, g.grid);
        UNROLL for (int r = 0; r < R; r++) f[r][t] = zero();
    }
    for (int b = 0; b < narrow; b += group, rows.eights += group) {
        sums_token<GridNibbles, R, T>(g, tiles, b, group, rows, sums);
        UNROLL for (int t = 0; t < T; t++) {
            d[t] = g.grid.pairs ? half_pairs(scales[t]) : half(scales[t]);
            scales[t] += dovetail::atom_scales(g.grid);
        }
        add_scaled<R, T>(sums, d, rows, row_scale + (size_t)4 * b, f);
    }
    if (g.grid.outliers) {
        UNROLL for (int t = 0; t < T; t++) {
            tiles[t].blocks += dovetail::atom_narrow(g.k_blocks, g.grid) - (size_t)512 * narrow;
            d[t] = half(scales[t]);
        }
        sums_token<GridBytes, R, T>(g, tiles, narrow, g.grid.outliers, rows, sums);
        add_scaled<R, T>(sums, d, rows, row_scale + (size_t)4 * narrow, f);
    }
    const F factor = all(g.grid.factor);
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int t = 0; t < T; t++) f[r][t] = mul(f[r][t], factor);
    put<R, T>(g, f);
}

// ---- rows of int8 codes with a scale for each 32 values

template <class W, int R, int T> void gemm_grid_int8(const GemmArgs& g) {
    GroupOf group(g);
    F f[R][T];
    GridTile tiles[T];
    UNROLL for (int t = 0; t < T; t++) tiles[t].open(g, t);
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int t = 0; t < T; t++) f[r][t] = zero();
    Int8Rows<R> rows;
    rows.open(g);
    for (int b = 0; b < g.k_blocks; b++, group.next(), rows.next()) {
        const uint8_t* at[T];
        I low[R][T], high[R][T];
        fetch(g, b);
        UNROLL for (int t = 0; t < T; t++) at[t] = tiles[t].blocks + (size_t)b * W::CODES;
        sums_int8<W, R, T>(at, rows, low, high);
        const int i = group.number;
        UNROLL for (int t = 0; t < T; t++) {
            const F d = g.grid.group ? tiles[t].scale(i) : all(1.0f);
            UNROLL for (int r = 0; r < R; r++) {
                f[r][t] = fma(to_float(low[r][t]), mul(d, rows.scales(r)), f[r][t]);
                if (g.grid.zeros) f[r][t] = fma(sub(zero(), mul(tiles[t].zero(i), d)), rows.sums(r), f[r][t]);
            }
        }
    }
    put_scaled<R, T>(g, f, nullptr);
}

// ---- rows of 16-bit integers under a scale for each 32 values

template <class W, int R> void gemm_grid_int16(const GemmArgs& g) {
    GroupOf group(g);
    F f[R][1];
    GridTile tile;
    Int16Rows<R> rows;
    tile.open(g, 0), rows.open(g);
    UNROLL for (int r = 0; r < R; r++) f[r][0] = zero();
    for (int b = 0; b < g.k_blocks; b++, group.next(), rows.next()) {
        const int i = group.number;
        const F d = g.grid.group ? tile.scale(i) : all(1.0f);
        W w;
        fetch(g, b);
        w.open(tile.blocks + (size_t)b * W::CODES);
        add_int16<W, R, WHOLE>(w, rows, d, f);
        if (!g.grid.zeros) continue;
        const F z = mul(tile.zero(i), d);
        UNROLL for (int r = 0; r < R; r++) f[r][0] = fma(z, all(rows.minus_sum(r)), f[r][0]);
    }
    put_scaled<R, 1>(g, f, nullptr);
}

// ---- float32 rows

template <class W, int R, int T, int B>
INLINE void byte_exact(const I (&codes)[T], const F (&zeros)[T], const float* const (&x)[R], int k, F (&sums)[R][T]) {
    UNROLL for (int t = 0; t < T; t++) {
        const I byte = iand(B ? right32<8 * B>(codes[t]) : codes[t], iall(255));
        const F w = sub(to_float(byte), zeros[t]);
        UNROLL for (int r = 0; r < R; r++) sums[r][t] = fma(w, all(x[r][k + B]), sums[r][t]);
    }
}
template <class W, int R, int T>
INLINE void quad_of_floats(const I (&codes)[T], const F (&zeros)[T], const float* const (&x)[R], int k, F (&sums)[R][T]) {
    byte_exact<W, R, T, 0>(codes, zeros, x, k, sums), byte_exact<W, R, T, 1>(codes, zeros, x, k, sums);
    byte_exact<W, R, T, 2>(codes, zeros, x, k, sums), byte_exact<W, R, T, 3>(codes, zeros, x, k, sums);
}
template <class W, int R, int T, int G>
INLINE void quads_of_floats(const W (&w)[T], const F (&zeros)[T], const float* const (&x)[R], int k, F (&sums)[R][T]) {
    I a[T], c[T];
    UNROLL for (int t = 0; t < T; t++) w[t].template operands<G>(a[t], c[t]);
    quad_of_floats<W, R, T>(a, zeros, x, k + 4 * G, sums);
    quad_of_floats<W, R, T>(c, zeros, x, k + 4 * G + 16, sums);
}

template <class W, int R, int T> void gemm_grid_exact(const GemmArgs& g) {
    GroupOf group(g);
    F f[R][T];
    GridTile tiles[T];
    const float* x[R];
    UNROLL for (int t = 0; t < T; t++) tiles[t].open(g, t);
    UNROLL for (int r = 0; r < R; r++) {
        x[r] = (const float*)(g.rows + r * g.row_stride);
        UNROLL for (int t = 0; t < T; t++) f[r][t] = zero();
    }
    for (int b = 0; b < g.k_blocks; b++, group.next()) {
        const int i = group.number;
        F zeros[T], sums[R][T];
        W w[T];
        fetch(g, b);
        UNROLL for (int t = 0; t < T; t++) {
            zeros[t] = all(8.0f * W::EIGHTS);
            if (g.grid.zeros) zeros[t] = add(zeros[t], tiles[t].zero(i));
            w[t].open(tiles[t].blocks + (size_t)b * W::CODES);
            UNROLL for (int r = 0; r < R; r++) sums[r][t] = zero();
        }
        quads_of_floats<W, R, T, 0>(w, zeros, x, 32 * b, sums), quads_of_floats<W, R, T, 1>(w, zeros, x, 32 * b, sums);
        quads_of_floats<W, R, T, 2>(w, zeros, x, 32 * b, sums), quads_of_floats<W, R, T, 3>(w, zeros, x, 32 * b, sums);
        UNROLL for (int t = 0; t < T; t++) {
            const F d = g.grid.group ? tiles[t].scale(i) : all(1.0f);
            UNROLL for (int r = 0; r < R; r++) f[r][t] = fma(sums[r][t], d, f[r][t]);
        }
    }
    put_scaled<R, T>(g, f, nullptr);
}

// ---- 8-bit floats: pairs of them become pairs of bfloat16, or floats

template <bool WIDE, int R, int T> void gemm_eights(const GemmArgs& g) {
    const int group = group_blocks(g);
    F f[R][T];
    GridTile tiles[T];
    UNROLL for (int t = 0; t < T; t++) tiles[t].open(g, t);
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int t = 0; t < T; t++) f[r][t] = zero();
    for (int b = 0, i = 0; b < g.k_blocks; b += group, i++) {
        F sums[R][T];
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int t = 0; t < T; t++) sums[r][t] = zero();
        for (int k = 16 * b; k < 16 * (b + group); k++) {
            I w[T];
            if (k % 16 < g.lines) prefetch(g.ahead + ((size_t)(k / 16) * g.lines + k % 16) * 64);
            UNROLL for (int t = 0; t < T; t++) w[t] = eights_as_bf16(tiles[t].blocks + (size_t)32 * k);
            UNROLL for (int r = 0; r < R; r++) {
                const uint8_t* row = g.rows + r * g.row_stride;
                if (WIDE) {
                    const float* x = (const float*)row + 2 * k;
                    UNROLL for (int t = 0; t < T; t++) {
                        sums[r][t] = fma(as_float(left32<16>(w[t])), all(x[0]), sums[r][t]);
                        sums[r][t] = fma(as_float(iand(w[t], iall((int)0xffff0000))), all(x[1]), sums[r][t]);
                    }
                } else {
                    const I x = iall(((const int32_t*)row)[k]);
                    UNROLL for (int t = 0; t < T; t++) sums[r][t] = dot_bf16(sums[r][t], w[t], x);
                }
            }
        }
        UNROLL for (int t = 0; t < T; t++) {
            const F d = g.grid.group ? tiles[t].scale(i) : all(1.0f);
            UNROLL for (int r = 0; r < R; r++) f[r][t] = fma(sums[r][t], d, f[r][t]);
        }
    }
    put_scaled<R, T>(g, f, WIDE ? nullptr : g.rows + (size_t)g.k_blocks * 64);
}

// ---- rows

INLINE float largest_magnitude(const float* x, int k_blocks) {
    F most = zero();  // as integers, magnitudes are in the order of their size, and NaN is beyond them
    for (int i = 0; i < 32 * k_blocks; i += 16) most = as_float(imax(as_int(most), as_int(magnitude(load(x + i)))));
    return highest_magnitude(most, most);
}

// -8 times the sum of the codes before each block, and of all.
INLINE void sum_eights(const int8_t* codes, int k_blocks, int32_t* eights) {
    int32_t sum = eights[0] = 0;
    for (int b = 0; b < k_blocks; b += 2) {
        alignas(64) int32_t sums[16];
        alignas(64) int8_t last[64] = {};
        const bool both_there = b + 1 < k_blocks;
        if (!both_there) __builtin_memcpy(last, codes + 32 * b, 32);
        istore(sums, sum_fours(dot_small(izero(), ball(1), iload(both_there ? codes + 32 * b : last))));
        for (int i = 0; i < (both_there ? 2 : 1); i++) eights[b + i + 1] = sum -= 8 * (sums[8 * i] + sums[8 * i + 4]);
    }
}

// `blocks` blocks of codes round(x * most / top), within [low, most]; returns the scale top / most.
INLINE float round_codes(const float* x, int blocks, float top, float low, float most, int8_t* codes) {
    const F by = all(top == 0 ? 0 : most / top);
    for (int i = 0; i < 32 * blocks; i += 16)
        store_bytes(codes + i, to_int(max(all(low), min(all(most), mul(load(x + i), by)))));
    return top / most;
}

// Codes round(x * 127 / max|x|) and the scale max|x| / 127.
void activate_token(const dovetail::RowArgs& a) {
    int8_t* codes = (int8_t*)a.row;
    float* scale = (float*)(a.row + (size_t)a.k_blocks * 32);
    *scale = round_codes(a.x, a.k_blocks, largest_magnitude(a.x, a.k_blocks), -127, 127, codes);
    sum_eights(codes, a.k_blocks, (int32_t*)(scale + 1));
}

// Groups of codes of 4 bits, and outliers of 8.
void activate_mixed(const dovetail::RowArgs& a) {
    const int32_t* sizes = (const int32_t*)a.shared[dovetail::SIZES];
    const int group = sizes[0], outliers = sizes[1], narrow = a.k_blocks - outliers;
    const float clip = *(const float*)a.shared[dovetail::CLIP];
    int8_t* codes = (int8_t*)a.row;
    float* scale = (float*)(a.row + (size_t)a.k_blocks * 32);
    for (int b = 0; b < narrow; b += group) {
        const float* x = a.x + 32 * b;
        scale[b] = round_codes(x, group, largest_magnitude(x, group) * clip, -8, 7, codes + 32 * b);
        for (int i = 1; i < group; i++) scale[b + i] = scale[b];
    }
    const float* x = a.x + 32 * narrow;
    if (outliers) scale[narrow] = round_codes(x, outliers, largest_magnitude(x, outliers), -127, 127, codes + 32 * narrow);
    for (int b = narrow + 1; b < a.k_blocks; b++) scale[b] = scale[narrow];
    sum_eights(codes, a.k_blocks, (int32_t*)(scale + a.k_blocks));
}

// e4m3 codes of x * 448 / max|x|, ties to even, as numbers; and the scale max|x| / 448.
void activate_eights(const dovetail::RowArgs& a) {
    uint16_t* y = (uint16_t*)a.row;
    const float most = largest_magnitude(a.x, a.k_blocks);
    const F by = all(most == 0 ? 0 : 448.0f / most), least = all(0x1p-6f), magic = all(0x1p14f);
    *(float*)(a.row + (size_t)a.k_blocks * 64) = most / 448.0f;
    for (int i = 0; i < 32 * a.k_blocks; i += 16) {
        const F x = mul(load(a.x + i), by), size = min(all(448.0f), magnitude(x));  // in this order NaN stays
        const I bits = as_int(size), odd = iand(right32<20>(bits), iall(1));
        const F four_digits = as_float(iand(iadd(bits, iadd(odd, iall(0x7ffff))), iall((int)0xfff00000)));
        const F coarse = sub(add(size, magic), magic);  // multiples of 2^-9, where exponents end
        store_bf16(y + i, ior_sign(choose(not_less(size, least), four_digits, coarse), x));
    }
}

// ---- the table

constexpr int TOKEN_TILES = TILES_MANY > 1 ? 3 : 1;  // of a register block of int8, whose sums have no floats beside them

int dots_alone(int n) {
    I sums[16], a = ball(1), b = ball(1);
    UNROLL for (int i = 0; i < 16; i++) sums[i] = izero();
    pin(a), pin(b);
    ROLLED for (; n > 0; n--) {
        UNROLL for (int i = 0; i < 16; i++) sums[i] = dot(sums[i], a, b);
        UNROLL for (int i = 0; i < 16; i++) pin(sums[i]);
    }
    UNROLL for (int i = 1; i < 16; i++) sums[0] = iadd(sums[0], sums[i]);
    int32_t lanes[16];
    istore(lanes, sums[0]);
    return lanes[0];
}

template <int R, int T> void add_grid_block(dovetail::Kernels& k) {
    using namespace dovetail;
    k.gemm[I8][INT8_TOKEN][R][T] = gemm_token<GridBytes, R, T>;
    if constexpr (T <= TILES_MANY) {
        k.gemm[ATOM][MIXED][R][T] = gemm_atom<R, T>;
        k.gemm[I4][INT8_TOKEN][R][T] = gemm_token<GridNibbles, R, T>;
        k.gemm[I4][dovetail::INT8][R][T] = gemm_grid_int8<GridNibbles, R, T>;
        k.gemm[I8][dovetail::INT8][R][T] = gemm_grid_int8<GridBytes, R, T>;
    }
    if constexpr (T == 1) {
        k.gemm[I4][EXACT][R][T] = gemm_grid_exact<GridNibbles, R, T>;
        k.gemm[I8][EXACT][R][T] = gemm_grid_exact<GridBytes, R, T>;
        k.gemm[I4][INT16][R][T] = gemm_grid_int16<GridNibbles, R>;
        k.gemm[I8][INT16][R][T] = gemm_grid_int16<GridBytes, R>;
        k.gemm[F8][EXACT][R][T] = gemm_eights<true, R, T>;
        k.gemm[F8][FP8_TOKEN][R][T] = gemm_eights<false, R, T>;
    }
}
template <int T, int R = 1> void add_grid_rows(dovetail::Kernels& k) {
    add_grid_block<R, T>(k);
    if constexpr (R < (T == 1 ? ROWS_ALONE : ROWS_MANY)) add_grid_rows<T, R + 1>(k);
}
inline void add_grid(dovetail::Kernels& k) {
    using namespace dovetail;
    add_grid_rows<1>(k);
    if constexpr (TOKEN_TILES >= 2) add_grid_rows<2>(k);
    if constexpr (TOKEN_TILES >= 3) add_grid_rows<3>(k);
    k.many[I8][INT8_TOKEN] = {ROWS_MANY, TOKEN_TILES};
    k.many[I8][EXACT] = k.many[I4][EXACT] = k.many[F8][EXACT] = k.many[F8][FP8_TOKEN] = {ROWS_ALONE, 1};
    k.many[I8][INT16] = k.many[I4][INT16] = {ROWS_ALONE, 1};
    k.activate[MIXED] = activate_mixed, k.dots = dots_alone;
    k.activate[INT8_TOKEN] = activate_token, k.activate[FP8_TOKEN] = activate_eights;
}

}  // namespace
