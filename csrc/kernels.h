// The kernels of one instruction set, as a table of functions. Plain types only: the files that fill a table are
// compiled for different CPUs and share no inline code with the rest.
#pragma once
#include "formats.h"

namespace dovetail {

constexpr int MAX_ROWS = 8;    // rows of a register block of a linear
constexpr int MAX_TILES = 3;   // tiles of a register block
constexpr int TALL_ROWS = 48;  // rows of a tall register block
constexpr int KEYS = 128;      // keys that attention handles at a time
constexpr int KEY_TILES = KEYS / 16;
constexpr int MAX_QUERIES = 12;  // query rows that meet a block of keys at a time: two register blocks with AVX-512

// A register block: some tiles of weights times some activation rows. Meanwhile `lines` cache lines per block of K are
// fetched, from `ahead` on.
struct GemmArgs {
    const uint8_t* weights;
    size_t tile_stride;
    int k_blocks;
    const uint8_t* rows;
    size_t row_stride;
    float* out;
    int out_stride;
    bool add;  // to what `out` holds
    const uint8_t* ahead;
    int lines;
    int row_count, tile_count;  // of the block
    GridShape grid;             // of weights on a grid
    const void* const* shared;  // of these, as of RowArgs
};

// A row of floats, zero-padded to k_blocks * 32, that becomes an activation row. shared: of the weights, by kind, or null.
struct RowArgs {
    const float* x;
    int k_blocks;
    uint8_t* row;
    int position;  // of its token
    const void* const* shared;
};

struct BlockShape {
    int rows, tiles;
};

// out[r][16 t + n] = product of activation row r and column n of tile t, for the block's rows and tiles.
using Gemm = void (*)(const GemmArgs& args);

enum KVType : int { KV_F32, KV_BF16, NUM_KV };

// How KV is stored. Codes have a scale for each token and KV head. INT8, FP8 (e4m3): x ~ scale * code. INT4, codes 0 to 15:
// x ~ low + scale * code.
enum KVStored : int { STORE_F32, STORE_BF16, STORE_INT8, STORE_INT4, STORE_FP8, NUM_STORED };

// A tile of codes has the order of a bfloat16 tile (n dimensions): vectors of 32 values, which take 32 bytes. With four bits,
// neighbouring vectors of a row share 32 bytes, the first of them in the low halves. K is one row of n / 2 vectors, V has 8
// rows of n / 16. So a byte belongs to one token. Behind the codes are the sixteen scales, and for INT4 the sixteen lows.
inline int code_bytes(KVStored stored, int n) { return stored == STORE_INT4 ? (n + 31) / 32 * 256 : 16 * n; }
inline int coded_tile(KVStored stored, int n) { return code_bytes(stored, n) + (stored == STORE_INT4 ? 128 : 64); }
enum Gate : int { GATE_NONE, GATE_SILU, GATE_GELU, GATE_GELU_TANH, GATE_RELU };

// out = activation(gate) * up, for `rows` rows of n values.
struct GateArgs {
    Gate kind;
    const float *gate, *up;
    int stride;
    float* out;
    int out_stride, rows, n;
};

// Query rows' softmax over a block of keys: maximum, sum of exponentials, and sum of exponentials times V.
struct State {
    float max[MAX_QUERIES], sum[MAX_QUERIES];
    float* out;                              // [rows][stride], of which head_dim are written
    int stride;
    int from[MAX_QUERIES], to[MAX_QUERIES];  // each row reads keys [from, to] of the block
};

// Keys and values of at most 128 tokens, as tiles of 16 tokens, in the attention layout.
struct KeyBlock {
    const void* k[KEY_TILES];
    const void* v[KEY_TILES];
    const void* next_k[KEY_TILES];  // to fetch meanwhile
    const void* next_v[KEY_TILES];
    int next_shift = 0;             // what comes next has 2^-next_shift of the bytes of these tiles
    // How tiles lie there. Codes are decoded row block by row block, so they suit a few rows.
    KVStored stored = STORE_BF16;
    // If they are codes, or were before they were decoded: the sixteen scales of each tile, and with `lows` sixteen lows.
    bool coded = false, lows = false;
    const float *k_scales[KEY_TILES], *v_scales[KEY_TILES];
    int first, last;                // tiles [first, last) are read, both even
};

// Called for one query row and n keys. Replaces the scores; -infinity where the key may not be read.
using Variant = void (*)(float* scores, const int32_t* k_pos, int32_t n, int32_t q_pos, int32_t head,
                         const float* params);

// How a page is summarised.
// BOUND, MEAN_STD: of each chunk [2][n] values, the maximum and minimum of its keys, or their mean and weighted standard
// deviation. A bound is multiplied with the positive and the negative part of a query, a mean with the query and its
// magnitude.
// CODES: of a page, the minimum of its keys, n values. Then, in the space of n values, a third of their range in each
// dimension as n bytes, in 255ths of the largest third, and the largest third as a float. Then how many thirds each key
// lies above the minimum, 2 bits a value, in tiles of sixteen keys: bits 2 j and 2 j + 1 of byte i of lane t of vector b
// are dimension 16 b + 4 j + i of key t.
// LANDMARKS: the mean of each chunk.
enum Summary : int { BOUND, MEAN_STD, CODES, NUM_SUMMARIES, LANDMARKS = NUM_SUMMARIES };

constexpr int CODE_SCALE = 16320;  // 255 * CODE_SCALE = 127 * 2^15
constexpr size_t CODE_UNIT = 64;
inline size_t code_query(int n, int element) { return (size_t)n * element + (size_t)(n + 31) / 32 * 64 + CODE_UNIT; }

// Scores queries [heads][rows][n], both halves of each, with summaries [page][heads][chunks][n] of the first `count` listed
// pages. The other listed pages are likely to be scored next. follows: these pages were listed so in the call before.
// out[h * out_stride + p]: the highest product of the rows of head h with a chunk of page p; NaN never counts.
// With codes, chunks are tiles of sixteen keys, and a query has `code_query` bytes: n values q; x = round(CODE_SCALE q / A)
// in 16 bits, where A is the largest magnitude; and CODE_UNIT before the end, the float 2^15 A / (255 CODE_SCALE).
struct PageScores {
    const void* q;
    int heads, rows, n, chunks;
    const uint8_t* summaries;
    const int32_t* pages;
    int count, listed;
    bool follows;
    float* out;
    size_t out_stride;
};

// Products of queries [heads][rows][n] with landmarks [page][heads][vectors][n] of the listed pages:
// out[((h * rows + r) * vectors + v) * stride + p].
struct LandmarkLogits {
    const void* q;
    int heads, rows, n, vectors;
    const uint8_t* landmarks;
    const int32_t* pages;
    int count;
    float* out;
    size_t stride;
};

// Of logits [rows][vectors][stride] of the vectors of n pages: out[p] is the highest log-softmax value of page p, over the
// logits of a row. Pages that do not compete have -infinity in all their vectors, and so has everything beyond n.
struct SoftmaxScores {
    const float* logits;
    int rows, vectors, n, stride;
    float* out;
};

// Keys of one page and head: tiles of 16 tokens in the attention layout, n dimensions.
struct PageTiles {
    const uint8_t* keys;
    size_t tile_bytes;
    int tiles, n;
    float deviations;  // what a standard deviation is multiplied with
};

// cos and then sin of `half` frequencies each, rounded up to sixteen. at_first: at position `first`, times the factor of
// the rotation. beyond: [16], at positions 0 to 15.
struct Angles {
    int first, half;
    const float *frequencies, *at_first, *beyond;
};

// Sixteen keys [16][n], of which `dim` values count, as coefficients [16][rank] times a basis. The basis is [rank][n] in
// float32. In bfloat16 the rank is even, and pairs of its rows lie side by side: [rank / 2][n][2].
struct RebuildArgs {
    const uint8_t* coefficients;
    int rank;
    const uint8_t* basis;
    int n, dim;
    Angles angles;
    uint8_t* out;  // a tile
};

constexpr int MAX_DIM = 512;  // of a head
constexpr int LOGITS = 64;  // logits that share one maximum, or one sum of odds

// Odds of a logit x: e^((x - most) * inverse), rounded to a multiple of grain * 2^-23; 0 below `least`.
struct Odds {
    float most, inverse, grain, least;
};

struct Kernels {
    const char* name;
    int queries;     // rows of a register block of attention
    int rows_alone;  // up to so many rows, one block of all rows by one tile at a time is best
    BlockShape many[NUM_FORMATS][NUM_ACTIVATIONS];  // the best register block for more rows
    Gemm gemm[NUM_FORMATS][NUM_ACTIVATIONS][MAX_ROWS + 1][MAX_TILES + 1];
    Gemm tall[NUM_FORMATS][NUM_ACTIVATIONS];  // where that is higher than MAX_ROWS: for any number of rows between the two

    // y = x / sqrt(mean(x^2) + eps) * w
    void (*rms_norm)(const float* x, const float* w, float eps, int n, float* y);
    void (*activate[NUM_ACTIVATIONS])(const RowArgs& args);
    void (*gate)(const GateArgs& args);
    int (*dots)(int n);  // n times 16 int8 dot products of vectors, and nothing else; their sum
    // Rotate one head: the half-split pairs of x by cos and sin [n / 2], times scale.
    void (*rotate)(const float* x, const float* cos, const float* sin, float scale, int n, float* y);
    void (*to_bf16)(const float* x, int n, uint16_t* y);
    // Writes a token's K and V [n], n a multiple of 16, as bfloat16 into column `t` of its tiles. If a value is not finite,
    // nothing is written and the result is false.
    bool (*write_bf16)(const float* k, const float* v, int n, int t, uint8_t* k_tile, uint8_t* v_tile);
    // Writes K or V [n] of a token as codes into column `t` of its tile, as `write_bf16` does.
    bool (*write_codes[NUM_STORED])(const float* x, int n, int t, bool keys, uint8_t* tile);
    // Codes as bfloat16, which is exact, in the order of their vectors. Those of INT4 become -8 to 7.
    void (*decode[NUM_STORED])(const uint8_t* codes, int rows, int vectors, uint8_t* out);
    // The keys that a tile of codes stands for, as a tile of bfloat16. Of n dimensions the first `dim` count, the rest is 0.
    void (*decode_keys[NUM_STORED])(const uint8_t* tile, int n, int dim, uint8_t* out);
    void (*argmax)(const float* x, int n, float* best, int* index);  // lowest index of the largest; NaN wins

    // Scores of query rows [rows][head_dim] against a block: scores [rows][KEYS].
    void (*scores[NUM_KV])(const void* q, size_t q_stride, int rows, int head_dim, const KeyBlock& keys, float* scores);
    // Softmax of the scores, which it overwrites, and the weighted sum of V.
    void (*mix[NUM_KV])(float* scores, int rows, int head_dim, const KeyBlock& keys, State& state);
    // Merge states of rows into records [n values, maximum, sum] (log-sum-exp); the empty state (maximum -infinity,
    // sum 0) is the identity.
    void (*merge)(float* const* records, int rows, const State& state, int n);
    void (*scale)(const float* x, float by, int n, float* y);

    void (*page_scores[NUM_SUMMARIES][NUM_KV])(const PageScores& args);
    void (*landmark_logits[NUM_KV])(const LandmarkLogits& args);
    // out[i]: the highest of scores [16 i, 16 i + 16); NaN never counts.
    void (*best_of_sixteen)(const float* scores, int n, float* out);
    // best [rows][n], n a multiple of 16: out[p] is the highest of best[r][p] - max(best[r]). Returns how many are above
    // -alpha.
    int (*margins)(const float* best, int rows, int n, float alpha, float* out);
    void (*softmax_scores)(const SoftmaxScores& args);
    // The indices of the `count` largest of x [n], ascending; of equal values the first ones. n is a multiple of 16; x has
    // no NaN.
    void (*largest)(const float* x, int n, int count, int32_t* out);
    // Bounds and moments: [chunks][2][n] in the compute type. Codes are of whole pages.
    void (*summarise[NUM_SUMMARIES][NUM_KV])(const PageTiles& page, int chunks, void* out);
    void (*landmarks[NUM_KV])(const PageTiles& page, int vectors, int stride, void* out);  // [vectors][stride]

    // Sixteen keys of a tile [dim] times a basis [dim][width]: a tile of `width` dimensions, an even number.
    void (*turn_keys[NUM_KV])(const uint8_t* tile, int dim, const float* basis, int width, uint8_t* out);
    void (*rebuild[NUM_KV])(const RebuildArgs& args);

    bool (*maxima)(const float* x, int n, float* y);  // of every 64 logits; false where there is a NaN
    void (*odds)(const float* x, int n, const Odds& how, float* y);
    void (*sum_odds)(const float* x, int n, const Odds& how, double* y);  // of every 64 logits
};

// The table of an instruction set, or null if this build or this CPU does not have it.
const Kernels* kernels(const char* name);
const Kernels* best_kernels();
const char* isa_name(int i);       // of the i-th that this build has, best first; null beyond
const char* emulated_name(int i);  // of the i-th that is only for tests

}  // namespace dovetail
