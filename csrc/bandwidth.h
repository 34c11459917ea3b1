#pragma once
#include <cstddef>

namespace dovetail {

// GB/s of a cold sequential read of `bytes` on `threads` threads: the best of three.
double read_bandwidth(size_t bytes, int threads);

}  // namespace dovetail
