// The tile registers of Intel AMX: eight of up to 16 rows of 64 bytes.
//
// They are written as assembly. The intrinsics of GCC 12 take only literal register numbers, and they do not say that a load
// reads memory, so the compiler could move stores behind it.
#pragma once
#include <stddef.h>

#include "macros.h"
#include "tile_shapes.h"

namespace {

INLINE void tile_configure(const TileShapes& shapes) { __asm__ volatile("ldtilecfg %0" ::"m"(shapes)); }
INLINE void tile_release() { __asm__ volatile("tilerelease"); }

template <int T> INLINE void tile_zero() { __asm__ volatile("tilezero %%tmm%c0" ::"i"(T)); }
template <int T> INLINE void tile_load(const void* p, size_t stride) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
template <int T> INLINE void tile_store(void* p, size_t stride) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(T) : "memory");
}

// C[m][n] += the products of A's bytes [m][4k..] and B's [k][4n..], both signed.
template <int C, int A, int B> INLINE void tile_dot() {
    __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
// The same of pairs of bfloat16, into float32.
template <int C, int A, int B> INLINE void tile_dot_bf16() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

}  // namespace
