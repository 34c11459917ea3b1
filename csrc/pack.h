// Weights in the packed layout, and single rows of stored weights.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>

#include "formats.h"
#include "mapped.h"

namespace dovetail {

// [n, k] weights as tiles of 16 columns. Other threads may read their memory at any time.
class Packed {
   public:
    // rows: n rows of `row_bytes` each, in the checkpoint's layout.
    Packed(Format format, const uint8_t* rows, size_t row_bytes, int n, int k, int threads);
    // Weights that were packed before and lie at `offset` in a file, which stays mapped.
    Packed(Format format, std::shared_ptr<const Mapping> file, size_t offset, int n, int k);
    Packed(const Packed&) = delete;
    Packed& operator=(const Packed&) = delete;

    const uint8_t* tile(int i) const { return data + i * tile_stride; }

    const Format format;
    const int n, k, tiles, k_blocks;
    const size_t tile_stride, bytes;
    const uint8_t* data;

   private:
    Packed(Format format, int n, int k);

    std::shared_ptr<const void> memory;
};

// A stored row of k values as float32, equal to the format's reference bit for bit.
void dequantize_row(Format format, const uint8_t* row, int k, float* out);

}  // namespace dovetail
