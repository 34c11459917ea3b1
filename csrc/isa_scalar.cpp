#include "simd/scalar.h"

#include "isa_table.h"

DOVETAIL_TABLE(scalar)
