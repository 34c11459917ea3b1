// Kernels are small pieces in tight loops: all of them belong into their callers, whatever the compiler thinks.
#pragma once
#define INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
