#include "simd/avx512.h"

#include "simd/amx.h"

#include "tile_table.h"

DOVETAIL_TILE_TABLE(amx)
