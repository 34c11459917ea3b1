// Kernels are small pieces in tight loops, so all of them must be inlined, whatever the compiler would choose.
#pragma once
#define INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
#define ROLLED _Pragma("GCC unroll 1")

// Keep a number in a general register, so that it is not computed again or folded into pointers.
INLINE void hold(unsigned long& x) { __asm__("" : "+r"(x)); }
