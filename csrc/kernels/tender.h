// Products of weights and activations in groups whose scales differ by powers of two (Tender; see ops/tender.py). The
// integer sum is doubled between groups, so scales come last. Groups end at k-quads. Blocks of 32 that lie within a group
// are multiplied as those of other weights are, and the others quad by quad.
//
// Sums and doublings are exact modulo 2^32. A weight whose sums may not fit is `wide`: groups are then summed in 32 bits
// and added up in 64.
#pragma once
#include "grid.h"

namespace {

using dovetail::TenderPlan;

struct TenderBytes : GridBytes {
    static constexpr int ID = dovetail::TENDER8;
    static INLINE I quad(const uint8_t* block, int i) { return iload(block + 64 * i); }
};
struct TenderNibbles : GridNibbles {
    static constexpr int ID = dovetail::TENDER4;
    static INLINE I quad(const uint8_t* block, int i) {
        const I v = iload(block + 64 * (i % 4));
        return i < 4 ? nibble_low(v) : nibble_high(v);
    }
};

// What follows a row's codes.
struct TenderRow {
    float scale;  // of the last group; NaN if a value was not finite
    int32_t chunk;
    int64_t eights;                          // -8 * the sum of all codes, doubled as the products are
    int32_t group[dovetail::TENDER_GROUPS];  // -8 * the sum of a group's codes
};

INLINE const TenderPlan& plan_of(const void* const* shared) { return *(const TenderPlan*)shared[dovetail::SIZES]; }
INLINE const TenderRow& tender_row(const GemmArgs& g, int r) {
    return *(const TenderRow*)(g.rows + r * g.row_stride + (size_t)g.k_blocks * 32);
}

// Quads of group `at`, one group after the other. The last one takes what is padding.
struct TenderGroup {
    int at = -1, codes = 0, first = 0, end = 0;
    INLINE void next(const TenderPlan& plan, int k_blocks) {
        first = end, codes += plan.sizes[++at];
        end = at == plan.groups - 1 ? 8 * k_blocks : (codes + 3) / 4;
    }
};

template <class W, int R, int T>
INLINE void quad_tender(const GemmArgs& g, const GridTile (&tiles)[T], int q, TokenRows<R>& rows, I (&sums)[R][T]) {
    I w[T];
    rows.codes = g.rows + 4 * q;
    UNROLL for (int t = 0; t < T; t++) w[t] = W::quad(tiles[t].blocks + (size_t)(q / 8) * W::CODES, q % 8);
    UNROLL for (int r = 0; r < R; r++) {
        const I x = rows.quad(r, 0);
        UNROLL for (int t = 0; t < T; t++) sums[r][t] = W::SMALL ? dot_small(sums[r][t], w[t], x) : dot(sums[r][t], w[t], x);
    }
}

// Products of a group. Two sums for each result, as in sums_token: the second one is for whole blocks.
template <class W, int R, int T>
INLINE void group_tender(const GemmArgs& g, const GridTile (&tiles)[T], const TenderGroup& group, TokenRows<R>& rows,
                         I (&sums)[R][T], I (&high)[R][T]) {
    int q = group.first;
    const int block = (q + 7) / 8 * 8, blocks = block < group.end ? block : group.end;
    ROLLED for (; q < blocks; q++) quad_tender<W, R, T>(g, tiles, q, rows, sums);
    rows.codes = g.rows + 4 * q;
    ROLLED for (; q + 8 <= group.end; q += 8, rows.codes += 32) {
        W w[T];
        fetch(g, q / 8);
        UNROLL for (int t = 0; t < T; t++) w[t].open(tiles[t].blocks + (size_t)(q / 8) * W::CODES);
        quads_token<W, R, T, 0>(w, rows, sums, high), quads_token<W, R, T, 1>(w, rows, sums, high);
        quads_token<W, R, T, 2>(w, rows, sums, high), quads_token<W, R, T, 3>(w, rows, sums, high);
    }
    ROLLED for (; q < group.end; q++) {
        if (q % 8 == 0) fetch(g, q / 8);
        quad_tender<W, R, T>(g, tiles, q, rows, sums);
    }
}

template <int R, int T> INLINE void clear(I (&sums)[R][T]) {
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int t = 0; t < T; t++) sums[r][t] = izero();
}
template <int R, int T> INLINE void twice(I (&sums)[R][T]) {
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int t = 0; t < T; t++) sums[r][t] = iadd(sums[r][t], sums[r][t]);
}
template <int R, int T> INLINE void gather(I (&sums)[R][T], const I (&high)[R][T]) {
    if (R * T <= 2)
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int t = 0; t < T; t++) sums[r][t] = iadd(sums[r][t], high[r][t]);
}

// Sums times the columns' and the rows' scales, and the product of the row's means.
template <int R, int T> INLINE void put_tender(const GemmArgs& g, F (&f)[R][T]) {
    UNROLL for (int t = 0; t < T; t++) {
        const float* tile = (const float*)(g.weights + t * g.tile_stride);
        UNROLL for (int r = 0; r < R; r++) {
            const TenderRow& row = tender_row(g, r);
            f[r][t] = mul(mul(f[r][t], load(tile)), all(row.scale));
            if (g.grid.biases) f[r][t] = add(f[r][t], load(tile + 16 + 16 * row.chunk));
        }
    }
    put<R, T>(g, f);
}

template <class W, int R> void gemm_tender_wide(const GemmArgs& g) {
    const TenderPlan& plan = plan_of(g.shared);
    alignas(64) int64_t totals[R][16] = {};
    alignas(64) int32_t part[16];
    alignas(64) float values[16];
    GridTile tile[1];
    TokenRows<R> rows;
    tile[0].open(g, 0), rows.open(g, 4);
    for (TenderGroup group; group.at + 1 < plan.groups;) {
        I sums[R][1], high[R][1];
        clear(sums), clear(high);
        group.next(plan, g.k_blocks);
        group_tender<W, R, 1>(g, tile, group, rows, sums, high);
        gather(sums, high);
        for (int r = 0; r < R; r++) {
            istore(part, sums[r][0]);
            for (int i = 0; i < 16; i++) totals[r][i] = 2 * totals[r][i] + part[i];
        }
    }
    F f[R][1];
    for (int r = 0; r < R; r++) {
        for (int i = 0; i < 16; i++) values[i] = (float)(totals[r][i] + W::EIGHTS * tender_row(g, r).eights);
        f[r][0] = load(values);
    }
    put_tender<R, 1>(g, f);
}

template <class W, int R, int T> void gemm_tender(const GemmArgs& g) {
    if (g.grid.wide) {
        for (int t = 0; t < T; t++) {
            GemmArgs one = g;
            one.weights += t * g.tile_stride, one.out += 16 * t;
            gemm_tender_wide<W, R>(one);
        }
        return;
    }
    const TenderPlan& plan = plan_of(g.shared);
    GridTile tiles[T];
    TokenRows<R> rows;
    I sums[R][T], high[R][T];
    UNROLL for (int t = 0; t < T; t++) tiles[t].open(g, t);
    rows.open(g, 4);
    clear(sums), clear(high);
    for (TenderGroup group; group.at + 1 < plan.groups;) {
        twice(sums);
        if (R * T <= 2) twice(high);
        group.next(plan, g.k_blocks);
        group_tender<W, R, T>(g, tiles, group, rows, sums, high);
    }
    gather(sums, high);
    F f[R][T];
    UNROLL for (int r = 0; r < R; r++) {
        const I zero_points = iall((int32_t)((uint32_t)W::EIGHTS * (uint32_t)tender_row(g, r).eights));
        UNROLL for (int t = 0; t < T; t++) f[r][t] = to_float(iadd(sums[r][t], zero_points));
    }
    put_tender<R, T>(g, f);
}

// For comparison: the sum of each group becomes a float, times its scale ("explicit requantization").
template <class W, int R, int T> void gemm_tender_explicit(const GemmArgs& g) {
    const TenderPlan& plan = plan_of(g.shared);
    GridTile tiles[T];
    TokenRows<R> rows;
    F f[R][T];
    UNROLL for (int t = 0; t < T; t++) tiles[t].open(g, t);
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int t = 0; t < T; t++) f[r][t] = zero();
    rows.open(g, 4);
    for (TenderGroup group; group.at + 1 < plan.groups;) {
        I sums[R][T], high[R][T];
        group.next(plan, g.k_blocks);
        if (group.first == group.end) continue;
        clear(high);
        UNROLL for (int r = 0; r < R; r++) {
            const I start = iall(W::EIGHTS * tender_row(g, r).group[group.at]);
            UNROLL for (int t = 0; t < T; t++) sums[r][t] = start;
        }
        group_tender<W, R, T>(g, tiles, group, rows, sums, high);
        gather(sums, high);
        const F scale = all((float)(1 << (plan.groups - 1 - group.at)));
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int t = 0; t < T; t++) f[r][t] = fma(to_float(sums[r][t]), scale, f[r][t]);
    }
    put_tender<R, T>(g, f);
}

// ---- rows

// The factors of codes [i, i + 16): powers of two times the last group's.
struct TenderFactors {
    const TenderPlan& plan;
    float factor;
    int group = 0, end;
    TenderFactors(const TenderPlan& p, float last)
        : plan(p), factor(last / (float)(1 << (p.groups - 1))), end(p.sizes[0]) {}
    INLINE void reach(int i) {
        for (; group < plan.groups - 1 && end <= i; factor *= 2) end += plan.sizes[++group];
    }
    INLINE F at(int i) {
        reach(i);
        if (group == plan.groups - 1 || end >= i + 16) return all(factor);
        alignas(64) float each[16];
        for (int j = 0; j < 16; j++) reach(i + j), each[j] = factor;
        return load(each);
    }
};

INLINE void sum_groups(const TenderPlan& plan, const int8_t* codes, int k_blocks, TenderRow& row) {
    TenderGroup group;
    alignas(64) int32_t quads[16];
    int32_t sum = 0;
    row.eights = 0;
    group.next(plan, k_blocks);
    const auto close = [&] {
        row.group[group.at] = -8 * sum, row.eights = 2 * row.eights - 8 * (int64_t)sum, sum = 0;
    };
    for (int q = 0; q < 8 * k_blocks; q++) {
        if (q % 16 == 0) istore(quads, dot_small(izero(), ball(1), iload(codes + 4 * q)));
        for (; q >= group.end; group.next(plan, k_blocks)) close();
        sum += quads[q % 16];
    }
    for (;; group.next(plan, k_blocks)) {
        close();
        if (group.at == plan.groups - 1) return;
    }
}

void activate_tender(const dovetail::RowArgs& a) {
    const TenderPlan& plan = plan_of(a.shared);
    int8_t* codes = (int8_t*)a.row;
    TenderRow& row = *(TenderRow*)(a.row + (size_t)a.k_blocks * 32);
    row.chunk = a.position / plan.chunk < plan.chunks ? a.position / plan.chunk : plan.chunks - 1;
    const float scale = ((const float*)a.shared[dovetail::SCALES])[row.chunk];
    const float* means = (const float*)a.shared[dovetail::MEANS];
    if (means) means += (size_t)row.chunk * 32 * a.k_blocks;
    const F low = all((float)-(1 << (plan.bits - 1))), high = all((float)((1 << (plan.bits - 1)) - 1));
    TenderFactors factors(plan, 1.0f / scale);
    F poison = zero();
    for (int i = 0; i < 32 * a.k_blocks; i += 16) {
        F x = load(a.x + i);
        poison = fma(x, zero(), poison);
        if (means) x = sub(x, load(means + i));
        store_bytes(codes + i, to_int(min(max(mul(x, factors.at(i)), low), high)));
    }
    row.scale = scale + sum(poison);
    sum_groups(plan, codes, a.k_blocks, row);
}

// ---- the table

template <int R, int T> void add_tender_block(dovetail::Kernels& k) {
    using namespace dovetail;
    k.gemm[TENDER8][TENDER][R][T] = gemm_tender<TenderBytes, R, T>;
    if constexpr (T <= 2) k.gemm[TENDER4][TENDER][R][T] = gemm_tender<TenderNibbles, R, T>;
    if constexpr (T <= 2 && R * T <= 12) k.gemm[TENDER8][TENDER_EXPLICIT][R][T] = gemm_tender_explicit<TenderBytes, R, T>;
}
template <int T, int R = 1> void add_tender_rows(dovetail::Kernels& k) {
    add_tender_block<R, T>(k);
    if constexpr (R < ROWS_ALONE) add_tender_rows<T, R + 1>(k);
}
inline void add_tender(dovetail::Kernels& k) {
    using namespace dovetail;
    add_tender_rows<1>(k);
    if constexpr (TOKEN_TILES >= 2) add_tender_rows<2>(k);
    if constexpr (TOKEN_TILES >= 3) add_tender_rows<3>(k);
    k.many[TENDER8][TENDER] = {ROWS_ALONE, TOKEN_TILES};
    k.many[TENDER4][TENDER] = {ROWS_ALONE, TOKEN_TILES < 2 ? TOKEN_TILES : 2};
    k.activate[TENDER] = k.activate[TENDER_EXPLICIT] = activate_tender;
}

}  // namespace
