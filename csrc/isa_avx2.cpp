#include "simd/avx2.h"

#include "isa_table.h"

DOVETAIL_TABLE(avx2)
