#pragma once
#include <cstddef>

#include "kernels.h"

namespace dovetail {

// GB/s of a cold sequential read of `bytes` on `threads` threads: the best of three.
double read_bandwidth(size_t bytes, int threads);

// Int8 dot products that need nothing but registers, and how many operations they are: two for each multiply-add.
double run_dots(const Kernels& kernels, int threads);

}  // namespace dovetail
