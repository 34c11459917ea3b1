// Paged KV as the kernels see it: base pointers and strides; the memory belongs to the caller.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels.h"

namespace dovetail {

// TILED: for each head and page, tiles of 16 tokens as attention reads them, first of K and then of V; `v` is the first tile
// of V. Page sizes are multiples of 16. The pages of a head lie together, so neighbouring pages are one stream.
// Tiles of codes have their scales with them. Attention decodes them to bfloat16 while it reads.
// NHD: [page][token][head][dim]. HND: [page][head][token][dim]. These are gathered into tiles while they are read.
enum Layout : int { TILED, NHD, HND };

struct KVMemory {
    Layout layout;
    KVStored stored;
    uint8_t *k, *v;
    float *k_scale, *v_scale;    // not TILED. Codes: [.., token, head] (or [.., head, token]); INT4: scale and minimum, pairs
    int64_t pages_per_layer;
    int page_size, heads, dim;
    int64_t cells;  // TILED: pages that there is memory for, for each head
    const int32_t* places = nullptr;  // [pages][heads]: the cell in which a page lies; null: the cell of its own number

    bool coded() const { return stored > STORE_BF16; }  // by codes and scales
    KVType compute() const { return stored == STORE_BF16 || (coded() && layout == TILED) ? KV_BF16 : KV_F32; }
    int padded() const { return (dim + 15) / 16 * 16; }
    int element() const { return compute() == KV_F32 ? 4 : 2; }
    size_t tile_bytes() const { return (size_t)16 * padded() * element(); }  // in the compute type
    size_t stored_tile() const { return coded() ? coded_tile(stored, padded()) : tile_bytes(); }
    // Tile of tokens [16 i, 16 i + 16) of a page, in the TILED layout.
    size_t tile(int64_t page, int head, int i) const {
        if (places) page = places[page * heads + head] < 0 ? 0 : places[page * heads + head];
        return ((size_t)(head * cells + page) * (page_size / 8) + i) * stored_tile();
    }
    // Index of a token's vector in the other layouts.
    size_t vector(int64_t page, int head, int offset) const {
        return layout == NHD ? ((size_t)page * page_size + offset) * heads + head
                             : ((size_t)page * heads + head) * page_size + offset;
    }
};

struct TokenPlace {
    int64_t page;
    int head, offset;  // of the token in its page
};

// Store K and V [dim] of one token. If a value is not finite, K becomes NaN and V becomes 0. Then only rows that read the
// token see it: masks replace its score, and its weight is then 0.
void write_token(const Kernels& kernels, const KVMemory& kv, const TokenPlace& place, const float* k, const float* v);

// Copy tokens [first, first + count) of a page into rows `at`.. of the block of tiles in the compute type.
void gather_tokens(const KVMemory& kv, int64_t page, int head, int first, int count, int at, uint8_t* k, uint8_t* v);

// TILED: the tiles of a page's keys, in the compute type. Codes are decoded into `room` first.
const uint8_t* page_keys(const Kernels& kernels, const KVMemory& kv, int64_t page, int head, std::vector<uint8_t>& room);

// Tiles of keys in bfloat16 as tiles of codes.
void encode_keys(const Kernels& kernels, const KVMemory& kv, const uint8_t* keys, uint8_t* out);

}  // namespace dovetail
