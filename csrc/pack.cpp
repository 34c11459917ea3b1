#include "pack.h"

#include <cstring>
#include <stdexcept>

#include "huge.h"
#include "small_floats.h"
#include "team.h"

namespace dovetail {

namespace {

uint16_t u16(const uint8_t* p) {
    uint16_t x;
    memcpy(&x, p, 2);
    return x;
}

uint32_t u32(const uint8_t* p) {
    uint32_t x;
    memcpy(&x, p, 4);
    return x;
}

// 32 values of one row: unsigned codes, and the scales and minima that turn them into numbers. In Q6_K each half has its own
// scale.
struct Codes {
    uint8_t q[32];
    uint16_t d = 0, m = 0;        // float16 scale and minimum (of the super-block, in K formats)
    uint8_t scale[2] = {0, 0};    // K formats: integer scale (of each half in Q6_K)
    uint8_t minimum = 0;          // K formats: integer minimum
};

void nibbles(const uint8_t* p, uint8_t* q) {
    for (int i = 0; i < 16; i++) q[i] = p[i] & 15, q[i + 16] = p[i] >> 4;
}

void six_bit_scales(const uint8_t* p, int i, uint8_t& scale, uint8_t& minimum) {
    if (i < 4) {
        scale = p[i] & 63, minimum = p[i + 4] & 63;
    } else {
        scale = (uint8_t)((p[i + 4] & 15) | (p[i - 4] >> 6) << 4);
        minimum = (uint8_t)(p[i + 4] >> 4 | (p[i] >> 6) << 4);
    }
}

void read_small(Format f, const uint8_t* p, Codes& c) {
    c.d = u16(p);
    if (f == Q8_0) {
        for (int i = 0; i < 32; i++) c.q[i] = (uint8_t)(p[2 + i] + 128);
        return;
    }
    const bool has_min = f == Q4_1 || f == Q5_1, five = f == Q5_0 || f == Q5_1;
    const uint8_t* at = p + (has_min ? 4 : 2);
    if (has_min) c.m = u16(p + 2);
    nibbles(at + (five ? 4 : 0), c.q);
    if (five) {
        const uint32_t high = u32(at);
        for (int i = 0; i < 32; i++) c.q[i] |= (uint8_t)((high >> i & 1) << 4);
    }
}

// Block b (of 8) of a super-block of 256.
void read_k(Format f, const uint8_t* p, int b, Codes& c) {
    if (f == Q6_K) {
        const uint8_t *low = p + 64 * (b / 4) + 32 * (b % 2), *high = p + 128 + 32 * (b / 4);
        const int shift = 4 * (b % 4 / 2), high_shift = 2 * (b % 4);
        for (int i = 0; i < 32; i++) c.q[i] = (uint8_t)((low[i] >> shift & 15) | (high[i] >> high_shift & 3) << 4);
        c.scale[0] = p[192 + 2 * b], c.scale[1] = p[192 + 2 * b + 1];
        c.d = u16(p + 208);
        return;
    }
    c.d = u16(p), c.m = u16(p + 2);
    six_bit_scales(p + 4, b, c.scale[0], c.minimum);
    const uint8_t* codes = p + (f == Q5_K ? 48 : 16) + 32 * (b / 2);
    for (int i = 0; i < 32; i++) c.q[i] = b % 2 ? codes[i] >> 4 : codes[i] & 15;
    if (f == Q5_K)
        for (int i = 0; i < 32; i++) c.q[i] |= (uint8_t)((p[16 + i] >> b & 1) << 4);
}

void read_block(Format f, const uint8_t* row, int b, Codes& c) {
    const FormatInfo& info = FORMATS[f];
    const uint8_t* p = row + (size_t)(b / info.blocks) * info.bytes;
    if (info.blocks == 1) read_small(f, p, c);
    else read_k(f, p, b % info.blocks, c);
}

// Codes of column `lane` into a block of a K format.
void place_codes(Format f, const uint8_t* q, int lane, uint8_t* block) {
    for (int k = 0; k < 16; k++) {
        const int at = 64 * (k / 4) + 4 * lane + k % 4;
        block[at] = (uint8_t)((q[k] & 15) | (q[k + 16] & 15) << 4);
    }
    if (f == Q5_K) {
        for (int k = 0; k < 32; k++) block[256 + 4 * lane + k % 4] |= (uint8_t)((q[k] >> 4) << (k / 4));
    } else if (f == Q6_K) {
        for (int k = 0; k < 32; k++)
            block[256 + 64 * (k / 16) + 4 * lane + k % 4] |= (uint8_t)((q[k] >> 4) << 2 * (k / 4 % 4));
    }
}

void place_scales(Format f, const Codes& c, int lane, uint8_t* head, uint8_t* block) {
    const FormatInfo& info = FORMATS[f];
    memcpy(head + 2 * lane, &c.d, 2);
    uint8_t* at = block + info.block - 32;
    at[lane] = c.scale[0];
    at[16 + lane] = f == Q6_K ? c.scale[1] : c.minimum;
    if (f != Q6_K) memcpy(head + 32 + 2 * lane, &c.m, 2);
}

// Formats whose block of 32 is one stored block. Codes i and i + 16 already share a byte, so four bytes are a lane's k-quad
// as they are.
void pack_small_block(Format f, const uint8_t* p, int lane, uint8_t* block) {
    const bool has_min = f == Q4_1 || f == Q5_1, five = f == Q5_0 || f == Q5_1;
    const uint8_t* at = p + (has_min ? 4 : 2);
    const uint8_t* codes = at + (five ? 4 : 0);
    const int quads = f == Q8_0 ? 8 : 4;
    for (int j = 0; j < quads; j++) {
        const uint32_t quad = u32(codes + 4 * j) ^ (f == Q8_0 ? 0x80808080u : 0u);  // to unsigned, zero point 128
        memcpy(block + 64 * j + 4 * lane, &quad, 4);
    }
    if (five) {
        const uint32_t high = u32(at);
        uint8_t bits[4] = {0, 0, 0, 0};
        for (int k = 0; k < 32; k++) bits[k % 4] |= (uint8_t)((high >> k & 1) << (k / 4));
        memcpy(block + 256 + 4 * lane, bits, 4);
    }
    uint8_t* scales = block + FORMATS[f].block - (has_min ? 64 : 32);
    memcpy(scales + 2 * lane, p, 2);
    if (has_min) memcpy(scales + 32 + 2 * lane, p + 2, 2);
}

void pack_codes_tile(Format f, const uint8_t* rows, size_t row_bytes, int columns, int k_blocks, uint8_t* tile) {
    const FormatInfo& info = FORMATS[f];
    for (int b = 0; b < k_blocks; b++) {
        uint8_t* head = tile + (size_t)(b / info.blocks) * (info.head + info.blocks * info.block);
        uint8_t* block = head + info.head + (b % info.blocks) * info.block;
        for (int lane = 0; lane < columns; lane++) {
            if (info.blocks == 1) {
                pack_small_block(f, rows + lane * row_bytes + (size_t)b * info.bytes, lane, block);
                continue;
            }
            Codes c;
            read_k(f, rows + lane * row_bytes + (size_t)(b / info.blocks) * info.bytes, b % info.blocks, c);
            place_codes(f, c.q, lane, block);
            place_scales(f, c, lane, head, block);
        }
    }
}

void pack_plain_tile(Format f, const uint8_t* rows, size_t row_bytes, int columns, int k, uint8_t* tile) {
    const int size = FORMATS[f].bytes;
    for (int lane = 0; lane < columns; lane++)
        for (int i = 0; i < k; i++) {
            const size_t to = f == BF16 ? ((size_t)(i / 2) * 16 + lane) * 2 + i % 2 : (size_t)i * 16 + lane;
            memcpy(tile + to * size, rows + lane * row_bytes + (size_t)i * size, size);
        }
}

constexpr size_t SLACK = 8192;  // prefetches run past the end

}  // namespace

Packed::Packed(Format format, const uint8_t* rows, size_t row_bytes, int n, int k, int threads)
    : format(format), n(n), k(k), tiles((n + TILE - 1) / TILE), k_blocks((k + BLOCK - 1) / BLOCK),
      tile_stride(tile_bytes(format, k_blocks)), bytes(tiles * tile_stride) {
    const FormatInfo& info = FORMATS[format];
    if (info.values > 1 && k % info.values) throw std::invalid_argument("k is no multiple of the format's block");
    data = take_huge(bytes + SLACK, memory);
    const auto pack = [&](int t) {
        const uint8_t* from = rows + (size_t)t * TILE * row_bytes;
        const int columns = n - t * TILE < TILE ? n - t * TILE : TILE;
        if (info.values == 1) pack_plain_tile(format, from, row_bytes, columns, k, data + t * tile_stride);
        else pack_codes_tile(format, from, row_bytes, columns, k_blocks, data + t * tile_stride);
    };
    Team(threads, 1).run([&](Member& member) { member.share((int)tiles, pack); });
}

void dequantize_row(Format f, const uint8_t* row, int k, float* out) {
    if (f == F32) {
        memcpy(out, row, (size_t)k * 4);
        return;
    }
    if (f == F16 || f == BF16) {
        for (int i = 0; i < k; i++) out[i] = f == F16 ? half_value(u16(row + 2 * i)) : bf16_value(u16(row + 2 * i));
        return;
    }
    const bool has_min = f == Q4_1 || f == Q5_1;
    const float zero = f == Q4_0 ? 8.0f : f == Q5_0 ? 16.0f : f == Q8_0 ? 128.0f : f == Q6_K ? 32.0f : 0.0f;
    for (int b = 0; b < k / 32; b++) {
        Codes c;
        read_block(f, row, b, c);
        const float d = half_value(c.d), m = half_value(c.m);
        for (int i = 0; i < 32; i++) {
            const float q = (float)c.q[i] - zero;
            float& y = out[32 * b + i];
            if (f == Q6_K) y = q * (d * (float)(int8_t)c.scale[i / 16]);
            else if (f == Q4_K || f == Q5_K) y = q * (d * (float)c.scale[0]) - m * (float)c.minimum;
            else y = has_min ? q * d + m : q * d;
        }
    }
}

}  // namespace dovetail
