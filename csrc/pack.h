// Weights in the packed layout, and single rows of stored weights.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "formats.h"
#include "mapped.h"

namespace dovetail {

// A weight on a grid as a checkpoint has it: codes by row, and arrays by row and group. Null for what there is not.
struct GridWeight {
    Format format;
    int n, k, groups;
    const uint8_t* codes;
    size_t row_bytes;
    const float* scale;   // [n][groups]
    const int16_t* zero;  // [n][groups], within int8
    int outliers;  // columns of ATOM that have 8 bits
    bool pairs;    // ATOM's scale is [n / 2][groups]
    const float* outlier_scale;  // [n]
    const float* bias;    // [n][chunks] of Tender
    std::string activation;
    std::vector<std::pair<const void*, size_t>> shared;  // by kind: an array, and its elements
};

// [n, k] weights as tiles of 16 columns. Other threads may read their memory at any time.
class Packed {
   public:
    // rows: n rows of `row_bytes` each, in the checkpoint's layout.
    Packed(Format format, const uint8_t* rows, size_t row_bytes, int n, int k, int threads);
    Packed(const GridWeight& weight, int threads);
    // Weights that were packed before and lie at `offset` in a file, which stays mapped.
    Packed(Format format, std::shared_ptr<const Mapping> file, size_t offset, int n, int k);
    Packed(const Packed&) = delete;
    Packed& operator=(const Packed&) = delete;

    const uint8_t* tile(int i) const { return data + begin + i * tile_stride; }
    // What rows are made with: the activation and the arrays that all rows have in common. Weights where this is the same
    // can share an activation row.
    std::string row_rule() const;
    const char* activation() const { return begin ? ((const GridHeader*)data)->activation : ""; }

    const Format format;
    const int n, k, tiles, k_blocks;
    const GridShape grid;
    const size_t begin, tile_stride, bytes;
    const uint8_t* data;
    const void* shared[NUM_SHARED] = {};  // arrays that all rows have in common, by kind, or null

   private:
    Packed(Format format, int n, int k, const GridHeader* header = nullptr);
    void find_shared();

    std::shared_ptr<const void> memory;
};

// A stored row of k values as float32, equal to the format's reference bit for bit.
void dequantize_row(Format format, const uint8_t* row, int k, float* out);

}  // namespace dovetail
