// What configures the eight tile registers: LDTILECFG's operand.
#pragma once
#include <stdint.h>

namespace {

struct alignas(64) TileShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {};  // of a row
    uint8_t rows[16] = {};

    void set(int first, int last, int tile_rows, int row_bytes) {
        for (int t = first; t <= last; t++) rows[t] = (uint8_t)tile_rows, bytes[t] = (uint16_t)row_bytes;
    }
};
static_assert(sizeof(TileShapes) == 64, "as the instruction reads it");

}  // namespace
