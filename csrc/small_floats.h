// float16, bfloat16 and e4m3 as float32. The kernels have their own: they share no inline code with the rest.
#pragma once
#include <cstdint>
#include <cstring>

namespace dovetail {

inline float half_value(uint16_t h) {
    const uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 1023;
    if (exponent == 0) {
        const float tiny = (float)fraction * 0x1p-24f;
        return sign ? -tiny : tiny;
    }
    const uint32_t bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | fraction << 13;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

inline float bf16_value(uint16_t h) {
    const uint32_t bits = (uint32_t)h << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

// Rounded to nearest even; NaN stays NaN.
inline uint16_t to_bf16(float x) {
    uint32_t b;
    memcpy(&b, &x, 4);
    return x != x ? 0x7fc0 : (uint16_t)((b + (b >> 16 & 1) + 0x7fff) >> 16);
}

// e4m3: no infinity; 448 is the largest. Below 2^-6 values are multiples of 2^-9.
inline float e4m3_value(uint8_t code) {
    const uint32_t sign = (uint32_t)(code & 128) << 24, x = code & 127, bits = sign | ((x << 20) + (120u << 23));
    float value;
    memcpy(&value, &bits, 4);
    if (x < 8) value = (sign ? -0x1p-9f : 0x1p-9f) * (float)x;
    return value;
}

// Of a magnitude of at most 448, rounded to nearest even.
inline uint8_t to_e4m3(float x) {
    const float small = (x < 0 ? -x : x) + 16384.0f;
    uint32_t b, s;
    memcpy(&b, &x, 4), memcpy(&s, &small, 4);
    b &= 0x7fffffff;
    const uint32_t code = b < 0x3c800000 ? s - 0x46800000 : ((b + (b >> 20 & 1) + 0x7ffff) >> 20) - (120 << 3);
    return (uint8_t)(code | (x < 0 ? 128 : 0));
}

// Rounded to nearest even, as float16; beyond its range infinity.
inline uint16_t to_half(float x) {
    uint32_t b;
    memcpy(&b, &x, 4);
    const uint16_t sign = b >> 16 & 0x8000;
    b &= 0x7fffffff;
    if (b >= 0x477ff000) return sign | (b > 0x7f800000 ? 0x7e00 : 0x7c00);
    if (b >= 0x38800000) return sign | (uint16_t)((b - 0x38000000 + 0xfff + (b >> 13 & 1)) >> 13);
    float size;
    memcpy(&size, &b, 4);
    return sign | (uint16_t)__builtin_rintf(size * 0x1p24f);  // below the smallest normal number
}

}  // namespace dovetail
