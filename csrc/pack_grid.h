// How weights on uniform grids are packed.
#pragma once
#include <memory>

#include "pack.h"

namespace dovetail {

// What its packed bytes begin with. Throws std::invalid_argument if the weight cannot be packed.
std::unique_ptr<GridHeader> header_of(const GridWeight& weight);

// Throws std::invalid_argument for scales that are not finite, and values that are no numbers.
void check_values(const GridWeight& weight);

// Rows [first, first + 16), or those that there are, into a tile of zeros.
void pack_grid_tile(const GridWeight& weight, const GridShape& shape, int first, uint8_t* tile);

}  // namespace dovetail
