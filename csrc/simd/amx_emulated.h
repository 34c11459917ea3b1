// Tile registers in plain C++, as Intel's manual describes those of AMX, for tests on CPUs without them. Where the manual
// says fault, the process ends.
#pragma once
#include <math.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "macros.h"
#include "tile_shapes.h"

namespace {

struct EmulatedTiles {
    TileShapes shapes;
    bool configured = false;
    alignas(64) uint8_t data[8][16][64];
};

inline EmulatedTiles& emulated() {
    thread_local EmulatedTiles tiles;
    return tiles;
}
inline void demand(bool met) {
    if (!met) abort();
}

__attribute__((noinline)) void tile_configure(const TileShapes& s) {
    EmulatedTiles& e = emulated();
    demand(s.palette == 1 && s.start_row == 0);
    for (uint8_t byte : s.reserved) demand(byte == 0);
    for (int t = 0; t < 16; t++) {
        demand(s.rows[t] <= (t < 8 ? 16 : 0) && s.bytes[t] <= (t < 8 ? 64 : 0));
        demand(!s.rows[t] == !s.bytes[t]);
    }
    e.shapes = s, e.configured = true;
    memset(e.data, 0, sizeof e.data);
}
inline void tile_release() { emulated().configured = false; }

// A register that may be used: one that the configuration gives rows.
inline uint8_t (*emulated_tile(int t))[64] {
    EmulatedTiles& e = emulated();
    demand(e.configured && t < 8 && e.shapes.rows[t]);
    return e.data[t];
}
__attribute__((noinline)) void emulated_load(int t, const uint8_t* p, size_t stride) {
    uint8_t(*tile)[64] = emulated_tile(t);
    const TileShapes& s = emulated().shapes;
    memset(tile, 0, 16 * 64);
    for (int r = 0; r < s.rows[t]; r++) memcpy(tile[r], p + r * stride, s.bytes[t]);
}
__attribute__((noinline)) void emulated_store(int t, uint8_t* p, size_t stride) {
    const uint8_t(*tile)[64] = emulated_tile(t);
    const TileShapes& s = emulated().shapes;
    for (int r = 0; r < s.rows[t]; r++) memcpy(p + r * stride, tile[r], s.bytes[t]);
}

// What a product asks of its registers, and then zeroes: C's bytes and rows beyond its shape.
inline void check_product(int c, int a, int b) {
    const TileShapes& s = emulated().shapes;
    uint8_t(*tile)[64] = emulated_tile(c);
    emulated_tile(a), emulated_tile(b);
    demand(c != a && c != b && a != b);
    demand(s.bytes[a] % 4 == 0 && s.bytes[b] % 4 == 0 && s.bytes[c] % 4 == 0);
    demand(s.rows[a] == s.rows[c] && s.bytes[b] == s.bytes[c] && s.rows[b] == s.bytes[a] / 4);
    for (int r = 0; r < 16; r++) {
        const int kept = r < s.rows[c] ? s.bytes[c] : 0;
        memset(tile[r] + kept, 0, 64 - kept);
    }
}
__attribute__((noinline)) void emulated_dot(int c, int a, int b) {
    check_product(c, a, b);
    const TileShapes& s = emulated().shapes;
    uint8_t(*to)[64] = emulated_tile(c), (*left)[64] = emulated_tile(a), (*right)[64] = emulated_tile(b);
    for (int m = 0; m < s.rows[c]; m++) {
        int32_t sums[16];
        memcpy(sums, to[m], 64);
        for (int k = 0; k < s.rows[b]; k++)
            for (int n = 0; n < s.bytes[c] / 4; n++)
                for (int i = 0; i < 4; i++) sums[n] += (int8_t)left[m][4 * k + i] * (int8_t)right[k][4 * n + i];
        memcpy(to[m], sums, 64);
    }
}

// A denormal counts as zero, before and after.
inline float flushed(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0, x) : x; }
// Rounded as if exponents had no lower limit. A result below 2^-126 is flushed to zero, even if a denormal would round up to
// 2^-126.
inline float flushed_fma(float a, float b, float c) {
    const float x = __builtin_fmaf(a, b, c);
    const bool edge = fabsf(x) == 0x1p-126f && fabsf(__builtin_fmaf(a * 0x1p60f, b, c * 0x1p60f)) < 0x1p-66f;
    return edge ? copysignf(0, x) : flushed(x);
}
inline float bf16_operand(const uint8_t* p) {
    uint32_t bits = (uint32_t)(p[0] | p[1] << 8) << 16;
    float x;
    memcpy(&x, &bits, 4);
    return flushed(x);
}

// Low and high ones of the pairs have a sum each; both together are added to C.
__attribute__((noinline)) void emulated_dot_bf16(int c, int a, int b) {
    check_product(c, a, b);
    const TileShapes& s = emulated().shapes;
    uint8_t(*to)[64] = emulated_tile(c), (*left)[64] = emulated_tile(a), (*right)[64] = emulated_tile(b);
    for (int m = 0; m < s.rows[c]; m++)
        for (int n = 0; n < s.bytes[c] / 4; n++) {
            float low = 0, high = 0, sum;
            for (int k = 0; k < s.rows[b]; k++) {
                low = flushed_fma(bf16_operand(left[m] + 4 * k), bf16_operand(right[k] + 4 * n), low);
                high = flushed_fma(bf16_operand(left[m] + 4 * k + 2), bf16_operand(right[k] + 4 * n + 2), high);
            }
            memcpy(&sum, to[m] + 4 * n, 4);
            sum = flushed(flushed(sum) + flushed(low + high));
            memcpy(to[m] + 4 * n, &sum, 4);
        }
}

template <int T> inline void tile_zero() { memset(emulated_tile(T), 0, 16 * 64); }
template <int T> inline void tile_load(const void* p, size_t stride) { emulated_load(T, (const uint8_t*)p, stride); }
template <int T> inline void tile_store(void* p, size_t stride) { emulated_store(T, (uint8_t*)p, stride); }
template <int C, int A, int B> inline void tile_dot() { emulated_dot(C, A, B); }
template <int C, int A, int B> inline void tile_dot_bf16() { emulated_dot_bf16(C, A, B); }

}  // namespace
