// Weights in the packed layout, and single rows of stored weights.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>

#include "formats.h"

namespace dovetail {

// [n, k] weights as tiles of 16 columns. It owns their memory, which other threads may read at any time.
class Packed {
   public:
    // rows: n rows of `row_bytes` each, in the checkpoint's layout.
    Packed(Format format, const uint8_t* rows, size_t row_bytes, int n, int k, int threads);
    Packed(const Packed&) = delete;
    Packed& operator=(const Packed&) = delete;

    const uint8_t* tile(int i) const { return data + i * tile_stride; }

    const Format format;
    const int n, k, tiles, k_blocks;
    const size_t tile_stride;
    size_t bytes;
    uint8_t* data;

   private:
    std::shared_ptr<void> memory;
};

// A stored row of k values as float32, equal to the format's reference bit for bit.
void dequantize_row(Format format, const uint8_t* row, int k, float* out);

}  // namespace dovetail
