// float16 and bfloat16 as float32. The kernels have their own: they share no inline code with the rest.
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

}  // namespace dovetail
