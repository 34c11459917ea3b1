// Stored and packed weight formats.
//
// Packed layout: a tile is 16 output columns; within it K runs in blocks of 32. Lane n of a 64-byte vector is
// column n, and its four bytes are four consecutive K ("k-quad"): the layout of vpdpbusd's unsigned operand.
// 4-bit codes: 64 bytes hold k-quad j in the low halves and j + 4 in the high halves, four such vectors a block.
// 5-bit codes: one more vector a block, bit j of each byte being the fifth bit of k-quad j.
// 6-bit codes: two more vectors a block; vector h holds bits 4-5 of k-quads 4h to 4h + 3, two bits each.
// Packed weights are kept in files: whoever changes the layout raises its number, and these files are made again.
#pragma once
#include <cstddef>
#include <cstdint>

namespace dovetail {

enum Format : int { F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K, NUM_FORMATS };
enum Activation : int { EXACT, INT8, BFLOAT, NUM_ACTIVATIONS };

constexpr int LAYOUT = 1;  // the number of the packed layout
constexpr int TILE = 16;   // columns of a tile
constexpr int BLOCK = 32;  // K of a block

// Values per stored block and its bytes (the checkpoint's layout), and the packed sizes: `head` bytes, then
// `blocks` blocks of `block` bytes, for 16 columns and blocks * 32 values of K.
struct FormatInfo {
    const char* name;
    int values, bytes;
    int blocks, head, block;
};

constexpr FormatInfo FORMATS[NUM_FORMATS] = {
    {"F32", 1, 4, 1, 0, 16 * 32 * 4},  {"F16", 1, 2, 1, 0, 16 * 32 * 2}, {"BF16", 1, 2, 1, 0, 16 * 32 * 2},
    {"Q4_0", 32, 18, 1, 0, 256 + 32},  {"Q4_1", 32, 20, 1, 0, 256 + 64}, {"Q5_0", 32, 22, 1, 0, 320 + 32},
    {"Q5_1", 32, 24, 1, 0, 320 + 64},  {"Q8_0", 32, 34, 1, 0, 512 + 32}, {"Q4_K", 256, 144, 8, 64, 256 + 32},
    {"Q5_K", 256, 176, 8, 64, 320 + 32}, {"Q6_K", 256, 210, 8, 32, 384 + 32},
};

inline size_t tile_bytes(Format f, int k_blocks) {
    const FormatInfo& i = FORMATS[f];
    return (size_t)(k_blocks / i.blocks) * (i.head + (size_t)i.blocks * i.block);
}

// One row of activations, as a linear reads it: `k_blocks` blocks of 32.
//   INT8:   int8 codes [K], float scale [blocks], float scale * sum [blocks], int32 -8 * sum [blocks],
//           int32 -32 * sum of each half block [2 * blocks]; then for each 8 blocks a float unit, and the scaled sums
//           as int16 multiples of it [blocks]
//   EXACT:  float [K], float sum [blocks]
//   BFLOAT: bfloat16 [K]
inline size_t activation_bytes(Activation a, int k_blocks) {
    const size_t raw = a == INT8 ? (size_t)k_blocks * (32 + 4 + 4 + 4 + 8 + 2) + (size_t)(k_blocks + 7) / 8 * 4
                       : a == EXACT ? (size_t)k_blocks * (128 + 4)
                                    : (size_t)k_blocks * 64;
    return (raw + 63) / 64 * 64;
}

}  // namespace dovetail
