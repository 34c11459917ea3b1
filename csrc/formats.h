// Stored and packed weight formats.
//
// Packed layout: a tile is 16 output columns; within it K runs in blocks of 32. Lane n of a 64-byte vector is
// column n, and its four bytes are four consecutive K ("k-quad"): the layout of vpdpbusd's unsigned operand.
// 4-bit codes: 64 bytes hold k-quad j in the low halves and j + 4 in the high halves, four such vectors a block.
// 5-bit codes: one more vector a block, bit j of each byte being the fifth bit of k-quad j.
// 6-bit codes: two more vectors a block; vector h holds bits 4-5 of k-quads 4h to 4h + 3, two bits each.
// 2-bit codes: two vectors a block, laid out as those two. 3-bit codes: one more, bit j of each byte for k-quad j.
// 8-bit floats (e4m3): 32 bytes hold a pair of K of each column, sixteen such pairs a block.
//
// Weights on uniform grids (I8, I4, F8; see ops/grids.py) are not stored in blocks. Their packed bytes begin with a
// GridHeader and what all rows have in common. A tile of them begins with a float factor of each column. If they have
// groups, there follow for each group the 16 float16 scales, which are multiplied with the factor; then for each group
// the 16 zero points as int8, if there are any; then, from the next multiple of 64 on, all blocks. A factor is a power
// of two, so that scales that were stored in float16 or bfloat16 keep their value. Without groups it is the scale.
// A tile of ATOM has blocks of 4 bits and then blocks of bytes, for the outliers. Behind them are the float16 scales of
// each group, 8 if neighbouring columns share them, else 16, and 16 of the outliers. One factor, in the header, suits all.
// Tender's weights (TENDER8, TENDER4) have no groups; behind the factors are a float bias of each column for each chunk
// of rows, if there are any.
// Packed weights are kept in files: whoever changes the layout raises its number, and these files are made again.
#pragma once
#include <cstddef>
#include <cstdint>

namespace dovetail {

enum Format : int { F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K, Q2_K, Q3_K, IQ4_NL, IQ4_XS, MXFP4,
                    I8, I4, F8, ATOM, TENDER8, TENDER4,
                    NUM_FORMATS };
enum Activation : int { EXACT, INT8, BFLOAT, INT16, INT8_TOKEN, FP8_TOKEN, MIXED, TENDER, TENDER_EXPLICIT, NUM_ACTIVATIONS };

constexpr int LAYOUT = 3;  // the number of the packed layout
constexpr int TILE = 16;   // columns of a tile
constexpr int BLOCK = 32;  // K of a block
// K of weights on grids. Sums of int8 products over all of K then stay within 32 bits, also halfway: with the zero point
// 128 taken off first, a sum lies below 127 * (255 a - 128 a + 128 b), where a codes were positive and b negative.
constexpr int MAX_GRID_K = 65536;

// Values per stored block and its bytes (the checkpoint's layout), and the packed sizes: `head` bytes, then
// `blocks` blocks of `block` bytes, for 16 columns and blocks * 32 values of K. Weights on grids have no stored block.
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
    {"Q2_K", 256, 84, 8, 64, 128 + 32},  {"Q3_K", 256, 110, 8, 32, 192 + 32},
    {"IQ4_NL", 32, 18, 1, 0, 256 + 32},  {"IQ4_XS", 256, 136, 8, 32, 256 + 16},
    {"MXFP4", 32, 17, 1, 0, 256 + 16},
    {"I8", 0, 0, 1, 0, 512}, {"I4", 0, 0, 1, 0, 256}, {"F8", 0, 0, 1, 0, 512},
    {"ATOM", 0, 0, 1, 0, 256}, {"TENDER8", 0, 0, 1, 0, 512}, {"TENDER4", 0, 0, 1, 0, 256},
};
constexpr bool on_grid(Format f) { return FORMATS[f].values == 0; }

// group: blocks of a group; 0 for one scale a column. outliers: blocks of them. pairs: whether neighbouring columns share
// scales. factor: of ATOM's scales. Of Tender's weights: biases, the number of chunks of rows that have one; wide, whether
// sums of 32 bits might overflow.
struct GridShape {
    int group, zeros, outliers, pairs;
    float factor;
    int biases, wide;
};

constexpr int TENDER_GROUPS = 20;

// How rows of activations are cut into groups and codes (ops/tender.py). It goes on with zeros to TENDER_GROUPS.
struct TenderPlan {
    int32_t bits, chunk, chunks, groups, sizes[TENDER_GROUPS];
};

// Arrays that all rows of a weight have in common, of 4 bytes an element. ORDER: int32 [k], the input column of each code.
// CLIP: float [1]; SIZES: int32 [2], ATOM's blocks of a group and of outliers, or a TenderPlan. Tender's SCALES: float
// [chunks]; MEANS: float [chunks][k_blocks * 32], by code.
enum Shared : int { ORDER, CLIP, SIZES, SCALES, MEANS, NUM_SHARED };

// Behind it the arrays, each from a multiple of 64 on. activation: how the checkpoint wants rows of activations.
struct GridHeader {
    char activation[16];
    int32_t counts[5];  // elements of each array
    GridShape shape;
};
static_assert(sizeof(GridHeader) == 64 && NUM_SHARED <= 5, "one line");

constexpr size_t lines(size_t bytes) { return (bytes + 63) / 64 * 64; }

// Where in a tile of a weight on a grid its zero points and its blocks begin.
inline size_t grid_zeros(int k_blocks, const GridShape& s) { return 64 + (s.group ? (size_t)(k_blocks / s.group) * 32 : 0); }
inline size_t grid_blocks(int k_blocks, const GridShape& s) {
    return lines(grid_zeros(k_blocks, s) + (s.zeros ? (size_t)(k_blocks / s.group) * 16 : 0) + (size_t)s.biases * 64);
}

// What the codes of formats with levels mean: IQ4_NL and IQ4_XS plus 128; MXFP4, in halves, plus 16.
constexpr uint8_t IQ4_LEVELS[16] = {1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241};
constexpr uint8_t MXFP4_LEVELS[16] = {16, 17, 18, 19, 20, 22, 24, 28, 16, 15, 14, 13, 12, 10, 8, 4};

// ATOM: bytes of 4-bit blocks and of all blocks, of the scales of a group, and of a tile.
inline size_t atom_narrow(int k_blocks, const GridShape& s) { return (size_t)(k_blocks - s.outliers) * 256; }
inline size_t atom_codes(int k_blocks, const GridShape& s) { return atom_narrow(k_blocks, s) + (size_t)s.outliers * 512; }
inline size_t atom_scales(const GridShape& s) { return s.pairs ? 16 : 32; }
inline size_t atom_tile(int k_blocks, const GridShape& s) {
    const size_t scales = (k_blocks - s.outliers) / s.group * atom_scales(s) + 32;
    return atom_codes(k_blocks, s) + (scales + 31) / 32 * 32;
}

inline size_t tile_bytes(Format f, int k_blocks) {
    const FormatInfo& i = FORMATS[f];
    return (size_t)(k_blocks / i.blocks) * (i.head + (size_t)i.blocks * i.block);
}

// One row of activations, as a linear reads it: `k_blocks` blocks of 32.
//   INT8:   int8 codes [K], float scale [blocks], float scale * sum [blocks], int32 -8 * sum [blocks],
//           int32 -32 * sum of each half block [2 * blocks]; then for each 8 blocks a float unit, and the scaled sums
//           as int16 multiples of it [blocks]
//   EXACT:  float [K], float sum of each half block [2 * blocks]
//   BFLOAT: bfloat16 [K]
//   INT16:  of each block 32 high and 32 low bytes of the codes, both signed: a code is 256 high + low. Then float scale
//           [blocks], float sum of the values of each half block [2 * blocks], int32 -8 * sum of the codes [blocks], int32
//           -32 * sum of each half block [2 * blocks]
//   INT8_TOKEN: int8 codes [K], float scale, int32 -8 * sum of the codes before each block and of all [blocks + 1]
//   FP8_TOKEN: e4m3 codes as bfloat16 [K], float scale
//   MIXED: int8 codes [K], float scale of each block's group [blocks], int32 -8 * sums as INT8_TOKEN's [blocks + 1]
//   TENDER: int8 codes [K], then a TenderRow (kernels/tender.h)
constexpr int INT16_MOST = 127 * 256 + 127;  // the largest code
inline size_t activation_bytes(Activation a, int k_blocks) {
    const size_t raw = a == INT8 ? (size_t)k_blocks * (32 + 4 + 4 + 4 + 8 + 2) + (size_t)(k_blocks + 7) / 8 * 4
                       : a == EXACT ? (size_t)k_blocks * (128 + 8)
                       : a == INT16 ? (size_t)k_blocks * (64 + 4 + 8 + 4 + 8)
                       : a == INT8_TOKEN ? (size_t)k_blocks * (32 + 4) + 8
                       : a == FP8_TOKEN ? (size_t)k_blocks * 64 + 4
                       : a == MIXED ? (size_t)k_blocks * (32 + 8) + 4
                       : a == TENDER || a == TENDER_EXPLICIT ? (size_t)k_blocks * 32 + 16 + 4 * TENDER_GROUPS
                                    : (size_t)k_blocks * 64;
    return (raw + 63) / 64 * 64;
}

}  // namespace dovetail
