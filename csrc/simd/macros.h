// Kernels are small pieces in tight loops: all of them belong into their callers, whatever the compiler thinks.
#pragma once
#define INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
#define ROLLED _Pragma("GCC unroll 1")

// Keep a number in a general register rather than have it computed again or folded into pointers.
INLINE void hold(unsigned long& x) { __asm__("" : "+r"(x)); }
