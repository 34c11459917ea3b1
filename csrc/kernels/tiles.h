// Products of many activation rows and packed weights through tile registers: of AMX, or emulated.
//
// int8 rows: a few blocks of K at a time are decoded to signed bytes, with zero points subtracted. They serve all rows, in
// groups. For each group and block the tile registers give integer sums. Vectors then do what kernels/linear.h does, in its
// order. The sums are exact, so results have the same bits.
//
// bfloat16 rows: the tile registers also sum over K. They add in another order than the vectors, so any number of rows goes
// through them.
#pragma once
#include <string.h>

#include "linear.h"

namespace {

constexpr int GROUP_ROWS = 12;  // with two tiles of weights the running sums fill 24 of 32 registers
constexpr int LEAST_ROWS = 5;   // of a group
constexpr int TALL_TILES = 2;
constexpr int SPAN = 8;         // blocks of K decoded at a time: all that they meet stays in the first-level cache
constexpr int LEAD = 2;         // blocks that the tile registers are ahead of the vectors
constexpr int SLOTS = 4;        // of integer sums, for blocks under way

enum Sums { PLAIN, MINIMUM, SUPER, SUPER_HALVES };  // SUPER: with super-blocks
template <class W>
constexpr Sums SUMS = W::HALVES ? SUPER_HALVES : INFO<W>.blocks > 1 ? SUPER : W::MIN ? MINIMUM : PLAIN;
static_assert(INFO<WQ4_K>.blocks == SPAN && INFO<WQ5_K>.blocks == SPAN && INFO<WQ6_K>.blocks == SPAN);
static_assert(INFO<WQ3_K>.blocks == SPAN && INFO<WIQ4_XS>.blocks == SPAN);

// A block of a weight tile: signed codes, k-quad by k-quad; its scale; its minimum or the second half's scale.
struct alignas(64) Decoded {
    uint8_t codes[512];
    float scale[16], other[16];
};

// What a super-block has beside its blocks.
struct alignas(64) DecodedSuper {
    float scale[16], minus_minimum[16];
    int32_t minima[SPAN / 2][16];  // of two blocks in each lane
};

template <class W, int G> INLINE void decode_quads(const W& w, uint8_t* codes) {
    const I zero_point = ball((int8_t)W::ZERO);
    I low, high;
    w.template operands<G>(low, high);
    istore(codes + 64 * G, W::ZERO ? bsub(low, zero_point) : low);
    istore(codes + 256 + 64 * G, W::ZERO ? bsub(high, zero_point) : high);
}

template <class W> void decode(const GemmArgs& g, int first, int count, Decoded (*to)[SPAN]) {
    constexpr auto info = INFO<W>;
    for (int b = first; b < first + count; b++) {
        for (int t = 0; t < g.tile_count; t++) {
            const uint8_t* head =
                g.weights + t * g.tile_stride + (size_t)(b / info.blocks) * (info.head + info.blocks * info.block);
            const uint8_t* at = head + info.head + (b % info.blocks) * info.block;
            Decoded& d = to[t][b - first];
            W w;
            w.open(at);
            decode_quads<W, 0>(w, d.codes), decode_quads<W, 1>(w, d.codes);
            decode_quads<W, 2>(w, d.codes), decode_quads<W, 3>(w, d.codes);
            if constexpr (info.blocks > 1) {
                store(d.scale, W::whole_scale(at));
                if constexpr (W::HALVES) store(d.other, W::whole_scale_high(at));
            } else {
                store(d.scale, W::scale(head, at));
                if constexpr (W::MIN) store(d.other, W::minimum(head, at));
            }
        }
    }
}

template <class W> void decode_super(const GemmArgs& g, int first, DecodedSuper* to) {
    constexpr auto info = INFO<W>;
    for (int t = 0; t < g.tile_count; t++, to++) {
        const uint8_t* head =
            g.weights + t * g.tile_stride + (size_t)(first / info.blocks) * (info.head + info.blocks * info.block);
        store(to->scale, half(head));
        if constexpr (W::MIN) {
            store(to->minus_minimum, sub(zero(), half(head + 32)));
            for (int b = 0; b < SPAN; b += 2)
                istore(to->minima[b / 2], pair_of_minima<W>(head + info.head + b * info.block));
        }
    }
}

// ---- int8 rows. Registers: 0 to 3 integer sums, 4 and 5 rows (of each half), 6 and 7 weights

// A tall block at work.
struct Tall {
    Tall(const GemmArgs& g, bool minima) : g(g), groups((g.row_count + GROUP_ROWS - 1) / GROUP_ROWS), minima(minima) {}

    // Rows are dealt out evenly; the last group is a largest one.
    int start(int i) const { return g.row_count * i / groups; }
    void open(int at, int blocks) {
        first = at, count = blocks, group = block = issued = used = 0;
        codes = g.rows + (size_t)32 * first;
    }
    void next() {
        codes += 32, issued++;
        if (++block < count) return;
        block = 0, codes = g.rows + start(++group) * g.row_stride + (size_t)32 * first;
    }

    const GemmArgs& g;
    const int groups;
    const bool minima;         // of super-blocks
    int first, count;          // the blocks of K that are decoded
    int group, block;          // what the tile registers do next
    const uint8_t* codes;      // its rows
    unsigned issued, used;     // blocks so far, by the tile registers and by the vectors
    Decoded weights[TALL_TILES][SPAN];
    DecodedSuper supers[TALL_TILES];
    alignas(64) int32_t totals[SLOTS][TALL_TILES][2][GROUP_ROWS][16];
    alignas(64) float sums[dovetail::TALL_ROWS][TALL_TILES * 16];  // over the blocks before `first`
    float scale[GROUP_ROWS][SPAN], scaled_sum[GROUP_ROWS][SPAN];
    float sum_unit[GROUP_ROWS];
    int32_t sum_pairs[GROUP_ROWS][SPAN / 2];
};

template <Sums S> void shape_int8(const Tall& w) {
    // As many rows as the largest group has. In a smaller group the last row is the next group's first, and is not used.
    const int rows = w.g.row_count - w.start(w.groups - 1);
    TileShapes shapes;
    shapes.set(0, 3, rows, 64);
    shapes.set(4, 5, rows, S == SUPER_HALVES ? 16 : 32);
    shapes.set(6, 7, S == SUPER_HALVES ? 4 : 8, 64);
    tile_configure(shapes);
}

template <int C, int A, int B> INLINE void total(const uint8_t* weights, int32_t (*to)[16]) {
    tile_load<B>(weights, 64);
    tile_zero<C>();
    tile_dot<C, A, B>();
    tile_store<C>(to, 64);
}

// The next block's integer sums.
template <Sums S, int T> INLINE void issue(Tall& w) {
    if (w.group == w.groups) return;
    auto& to = w.totals[w.issued % SLOTS];
    tile_load<4>(w.codes, w.g.row_stride);
    if (S == SUPER_HALVES) tile_load<5>(w.codes + 16, w.g.row_stride);
    const uint8_t* weights = w.weights[0][w.block].codes;
    total<0, 4, 6>(weights, to[0][0]);
    if (S == SUPER_HALVES) total<1, 5, 7>(weights + 256, to[0][1]);
    if (T == 2) {
        weights = w.weights[1][w.block].codes;
        total<2, 4, S == SUPER_HALVES ? 6 : 7>(weights, to[1][0]);
        if (S == SUPER_HALVES) total<3, 5, 7>(weights + 256, to[1][1]);
    }
    w.next();
}

INLINE void copy(float* to, const float* from, int n) {
    if (n == SPAN) memcpy(to, from, sizeof(float) * SPAN);
    else
        for (int i = 0; i < n; i++) to[i] = from[i];
}

// The rows' scales of these blocks, side by side.
template <Sums S> __attribute__((noinline)) void gather_scales(Tall& w, int start, int rows) {
    const size_t blocks = (size_t)w.g.k_blocks;
    for (int r = 0; r < rows; r++) {
        const uint8_t* codes = w.g.rows + (start + r) * w.g.row_stride;
        const float* scale = (const float*)(codes + blocks * 32) + w.first;
        copy(w.scale[r], scale, w.count);
        if (S == MINIMUM) copy(w.scaled_sum[r], scale + blocks, w.count);
        if (S != SUPER || !w.minima) continue;
        const float* units = (const float*)(codes + blocks * 52);
        w.sum_unit[r] = units[w.first / SPAN];
        memcpy(w.sum_pairs[r], (const int16_t*)(units + blocks / SPAN) + w.first, sizeof w.sum_pairs[r]);
    }
}

// A block's part of the results, or of the super-block's sums.
template <Sums S, int R, int T> INLINE void add_block(Tall& w, int b, F (&f)[R][T]) {
    const auto& totals = w.totals[w.used++ % SLOTS];
    F d[T], other[T];
    UNROLL for (int t = 0; t < T; t++) {
        d[t] = load(w.weights[t][b].scale);
        other[t] = S == MINIMUM || S == SUPER_HALVES ? load(w.weights[t][b].other) : zero();
    }
    UNROLL for (int r = 0; r < R; r++) {
        const F s = all(w.scale[r][b]), m = S == MINIMUM ? all(w.scaled_sum[r][b]) : zero();
        UNROLL for (int t = 0; t < T; t++) {
            const F total = to_float(iload(totals[t][0][r]));
            if (S >= SUPER) {
                F scaled = mul(total, d[t]);
                if (S == SUPER_HALVES) scaled = fma(to_float(iload(totals[t][1][r])), other[t], scaled);
                f[r][t] = fma(scaled, s, f[r][t]);
            } else {
                f[r][t] = fma(total, mul(d[t], s), f[r][t]);
                if (S == MINIMUM) f[r][t] = fma(other[t], m, f[r][t]);
            }
        }
    }
}

// The result so far, plus the sums of a super-block.
template <Sums S, int R, int T> INLINE void add_super(const Tall& w, int start, F (&f)[R][T]) {
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int t = 0; t < T; t++) {
            const DecodedSuper& super = w.supers[t];
            const F before = w.first ? load(w.sums[start + r] + 16 * t) : zero();
            f[r][t] = fma(f[r][t], load(super.scale), before);
            if (S != SUPER || !w.minima) continue;
            I sum = izero();
            UNROLL for (int b = 0; b < SPAN / 2; b++)
                sum = dot_words(sum, iload(super.minima[b]), iall(w.sum_pairs[r][b]));
            f[r][t] = fma(to_float(sum), mul(load(super.minus_minimum), all(w.sum_unit[r])), f[r][t]);
        }
}

template <Sums S, int R, int T> void add_group(Tall& w, int start) {
    const GemmArgs& g = w.g;
    F f[R][T];
    gather_scales<S>(w, start, R);
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int t = 0; t < T; t++) f[r][t] = S < SUPER && w.first ? load(w.sums[start + r] + 16 * t) : zero();
    for (int b = 0; b < w.count; b++) {
        if (start == 0) fetch(g, w.first + b);
        issue<S, T>(w);
        add_block<S, R, T>(w, b, f);
    }
    if (S >= SUPER) add_super<S, R, T>(w, start, f);
    const bool done = w.first + w.count == g.k_blocks, more = done && g.add;
    float* to = done ? g.out + (size_t)start * g.out_stride : w.sums[start];
    const size_t stride = done ? g.out_stride : TALL_TILES * 16;
    UNROLL for (int r = 0; r < R; r++, to += stride)
        UNROLL for (int t = 0; t < T; t++) store(to + 16 * t, more ? add(load(to + 16 * t), f[r][t]) : f[r][t]);
}

template <Sums S, int T> void add_span(Tall& w) {
    constexpr void (*ADD[])(Tall&, int) = {add_group<S, 5, T>,  add_group<S, 6, T>,  add_group<S, 7, T>,
                                           add_group<S, 8, T>,  add_group<S, 9, T>,  add_group<S, 10, T>,
                                           add_group<S, 11, T>, add_group<S, 12, T>};
    for (int i = 0; i < LEAD; i++) issue<S, T>(w);
    for (int i = 0; i < w.groups; i++) ADD[w.start(i + 1) - w.start(i) - LEAST_ROWS](w, w.start(i));
}

template <class W> void tall_int8(const GemmArgs& g) {
    constexpr Sums S = SUMS<W>;
    Tall w(g, S == SUPER && W::MIN);
    shape_int8<S>(w);
    for (int b = 0; b < g.k_blocks; b += SPAN) {
        w.open(b, g.k_blocks - b < SPAN ? g.k_blocks - b : SPAN);
        decode<W>(g, b, w.count, w.weights);
        if constexpr (S >= SUPER) decode_super<W>(g, b, w.supers);
        if (g.tile_count == 2) add_span<S, 2>(w);
        else add_span<S, 1>(w);
    }
    tile_release();
}

// ---- bfloat16 rows. Registers: 0 to 3 sums, 4 and 5 rows, 6 and 7 weights; M and T of them are in use

constexpr int BF16_ROWS = 32;

template <int M, int T> INLINE void sum_bf16(const GemmArgs& g, float* out, size_t stride) {
    const uint8_t *rows = g.rows, *weights = g.weights;
    tile_zero<0>();
    if (T == 2) tile_zero<1>();
    if (M == 2) tile_zero<2>();
    if (M == 2 && T == 2) tile_zero<3>();
    for (int b = 0; b < g.k_blocks; b++, rows += 64, weights += 1024) {
        fetch(g, b);
        tile_load<4>(rows, g.row_stride);
        tile_load<6>(weights, 64);
        tile_dot_bf16<0, 4, 6>();
        if (T == 2) tile_load<7>(weights + g.tile_stride, 64), tile_dot_bf16<1, 4, 7>();
        if (M == 2) tile_load<5>(rows + 16 * g.row_stride, g.row_stride), tile_dot_bf16<2, 5, 6>();
        if (M == 2 && T == 2) tile_dot_bf16<3, 5, 7>();
    }
    tile_store<0>(out, 4 * stride);
    if (T == 2) tile_store<1>(out + 16, 4 * stride);
    if (M == 2) tile_store<2>(out + 16 * stride, 4 * stride);
    if (M == 2 && T == 2) tile_store<3>(out + 16 * stride + 16, 4 * stride);
}

void tiles_bf16(const GemmArgs& g) {
    const int upper = g.row_count < 16 ? g.row_count : 16, lower = g.row_count - upper;
    TileShapes shapes;
    shapes.set(0, 1, upper, 64), shapes.set(4, 4, upper, 64);
    if (lower) shapes.set(2, 3, lower, 64), shapes.set(5, 5, lower, 64);
    shapes.set(6, 7, 16, 64);
    tile_configure(shapes);
    alignas(64) float sums[BF16_ROWS][TALL_TILES * 16];
    float* out = g.add ? sums[0] : g.out;
    const size_t stride = g.add ? TALL_TILES * 16 : g.out_stride;
    if (lower) g.tile_count == 2 ? sum_bf16<2, 2>(g, out, stride) : sum_bf16<2, 1>(g, out, stride);
    else g.tile_count == 2 ? sum_bf16<1, 2>(g, out, stride) : sum_bf16<1, 1>(g, out, stride);
    tile_release();
    for (int r = 0; g.add && r < g.row_count; r++)
        for (int i = 0; i < 16 * g.tile_count; i += 16) {
            float* to = g.out + (size_t)r * g.out_stride + i;
            store(to, add(load(to), load(sums[r] + i)));
        }
}

// ---- the table: another one's, with these products

// Where the other table has no block of vectors for so few rows, a tall block is used.
template <class W> void add_tall(dovetail::Kernels& k) {
    k.tall[W::ID][dovetail::INT8] = tall_int8<W>;
    k.many[W::ID][dovetail::INT8] = {dovetail::TALL_ROWS, TALL_TILES};
    for (int r = LEAST_ROWS; r <= dovetail::MAX_ROWS; r++)
        for (int t = 1; t <= TALL_TILES; t++) {
            dovetail::Gemm& gemm = k.gemm[W::ID][dovetail::INT8][r][t];
            if (!gemm) gemm = tall_int8<W>;
        }
}
inline void add_tiles(dovetail::Kernels& k) {
    using namespace dovetail;
    add_tall<WQ4_0>(k), add_tall<WQ4_1>(k), add_tall<WQ5_0>(k), add_tall<WQ5_1>(k);
    add_tall<WQ8_0>(k), add_tall<WQ4_K>(k), add_tall<WQ5_K>(k), add_tall<WQ6_K>(k);
    add_tall<WQ3_K>(k), add_tall<WIQ4_NL>(k), add_tall<WIQ4_XS>(k), add_tall<WMXFP4>(k);  // Q2_K: by vectors
    for (int r = 1; r <= MAX_ROWS; r++)
        for (int t = 1; t <= TALL_TILES; t++) k.gemm[dovetail::BF16][BFLOAT][r][t] = tiles_bf16;
    k.tall[dovetail::BF16][BFLOAT] = tiles_bf16;
    k.many[dovetail::BF16][BFLOAT] = {BF16_ROWS, TALL_TILES};
}

}  // namespace
