#include "simd/avx2.h"

#include "simd/amx_emulated.h"

#include "tile_table.h"

DOVETAIL_TILE_TABLE(amx_emulated)
