// Tests whether tile registers give the same bits as vectors, on one small product of each shape. bfloat16 is tested with
// whole numbers, whose sums are exact in any order.
#pragma once
#include <string.h>

#include "../kernels.h"

namespace {

struct Trial {
    static constexpr int ROWS = 13, TILES = 2, BLOCKS = 8, K = 32 * BLOCKS, COLUMNS = 16 * TILES;
    static constexpr int ROW = 2 * K, TILE = 2 * K * 16;  // bytes that suffice

    Trial(const dovetail::Kernels& base, dovetail::Format f, dovetail::Activation a)
        : base(base), format(f), activation(a) {
        float x[K];
        for (int r = 0; r < ROWS; r++) {
            for (int i = 0; i < K; i++) x[i] = (float)((37 * i + 11 * r) % 101 - 50);
            base.activate[a]({x, BLOCKS, rows + r * ROW, 0, nullptr});
        }
        for (int i = 0; i < TILES * TILE; i++) weights[i] = (uint8_t)(i * (i + 3) % 61);  // below 64: scales are finite
        for (int c = 0; f == dovetail::BF16 && c < COLUMNS; c++) {
            for (int i = 0; i < K; i++) x[i] = (float)((19 * i + 7 * c) % 61 - 30);
            base.to_bf16(x, K, (uint16_t*)weights + c * K);
        }
    }

    void multiply(dovetail::Gemm gemm, int row, int n, int tile, int tiles, float* out) const {
        gemm({weights + tile * TILE, TILE, BLOCKS, rows + row * ROW, ROW, out + row * COLUMNS + 16 * tile, COLUMNS,
              false, weights, 0, n, tiles, {}, nullptr});
    }

    bool passes(const dovetail::Kernels& tiled) {
        multiply(tiled.tall[format][activation], 0, ROWS, 0, TILES, got);
        for (int r = 0; r < ROWS; r++)
            for (int t = 0; t < TILES; t++) multiply(base.gemm[format][activation][1][1], r, 1, t, 1, want);
        return !memcmp(got, want, sizeof got);
    }

    const dovetail::Kernels& base;
    const dovetail::Format format;
    const dovetail::Activation activation;
    alignas(64) uint8_t weights[TILES * TILE], rows[ROWS * ROW];
    alignas(64) float got[ROWS * COLUMNS], want[ROWS * COLUMNS];
};

inline bool tiles_agree(const dovetail::Kernels& base, const dovetail::Kernels& tiled) {
    using namespace dovetail;
    return Trial(base, Q8_0, INT8).passes(tiled) && Trial(base, Q4_K, INT8).passes(tiled) &&
           Trial(base, Q6_K, INT8).passes(tiled) && Trial(base, BF16, BFLOAT).passes(tiled);
}

}  // namespace
