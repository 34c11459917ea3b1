#include "simd/avx512.h"

#include "isa_table.h"

DOVETAIL_TABLE(avx512_vnni)
