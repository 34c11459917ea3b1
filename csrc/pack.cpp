#include "pack.h"

#include <cstring>
#include <stdexcept>

#include "huge.h"
#include "pack_grid.h"
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

// A word of bytes, so that one operation acts on many codes: words of 16 bytes are vector instructions on every CPU.
typedef uint32_t Words __attribute__((vector_size(16), aligned(4)));

Words words(const uint8_t* p) {
    Words w;
    memcpy(&w, p, 16);
    return w;
}

// Byte b in every byte.
constexpr uint32_t each(uint32_t b) { return b * 0x01010101u; }

// The four k-quads of w into column `lane` of four vectors.
void scatter(const Words& w, int lane, uint8_t* to) {
    for (int j = 0; j < 4; j++) memcpy(to + 64 * j + 4 * lane, &w[j], 4);
}

// 32 codes of 4 bits, one in the low half of each byte of p (or the high half), into a block. Codes i and i + 16 share a byte.
void place_nibbles(const uint8_t* p, bool high, int lane, uint8_t* block) {
    const Words a = words(p), b = words(p + 16);
    scatter(high ? (a >> 4 & each(15)) | (b & each(0xf0)) : (a & each(15)) | (b & each(15)) << 4, lane, block);
}

// Bit `bit` of each of 32 bytes: the fifth bits of a block.
void place_fifth(const uint8_t* p, int bit, int lane, uint8_t* block) {
    uint32_t bits = 0;
    for (int j = 0; j < 8; j++) bits |= (u32(p + 4 * j) >> bit & each(1)) << j;
    memcpy(block + 256 + 4 * lane, &bits, 4);
}

// Bits `shift` and `shift` + 1 of each of 32 bytes: bits 4 and 5 of a block's codes.
void place_pairs(const uint8_t* p, int shift, int lane, uint8_t* block) {
    for (int h = 0; h < 2; h++) {
        uint32_t bits = 0;
        for (int j = 0; j < 4; j++) bits |= (u32(p + 16 * h + 4 * j) >> shift & each(3)) << 2 * j;
        memcpy(block + 256 + 64 * h + 4 * lane, &bits, 4);
    }
}

// The super-block of 256 at p into column `lane` of a group of blocks.
void pack_k_blocks(Format f, const uint8_t* p, int lane, uint8_t* head) {
    const FormatInfo& info = FORMATS[f];
    memcpy(head + 2 * lane, f == Q6_K ? p + 208 : p, 2);
    if (f != Q6_K) memcpy(head + 32 + 2 * lane, p + 2, 2);
    for (int b = 0; b < 8; b++) {
        uint8_t* block = head + info.head + b * info.block;
        uint8_t* scales = block + info.block - 32 + lane;
        if (f == Q6_K) {
            place_nibbles(p + 64 * (b / 4) + 32 * (b % 2), b % 4 / 2, lane, block);
            place_pairs(p + 128 + 32 * (b / 4), 2 * (b % 4), lane, block);
            scales[0] = p[192 + 2 * b], scales[16] = p[192 + 2 * b + 1];
            continue;
        }
        place_nibbles(p + (f == Q5_K ? 48 : 16) + 32 * (b / 2), b % 2, lane, block);
        if (f == Q5_K) place_fifth(p + 16, b, lane, block);
        six_bit_scales(p + 4, b, scales[0], scales[16]);
    }
}

// Formats whose block of 32 is one stored block. Codes i and i + 16 already share a byte, so four bytes are a lane's k-quad
// as they are.
void pack_small_block(Format f, const uint8_t* p, int lane, uint8_t* block) {
    const bool has_min = f == Q4_1 || f == Q5_1, five = f == Q5_0 || f == Q5_1;
    const uint8_t* at = p + (has_min ? 4 : 2);
    const uint8_t* codes = at + (five ? 4 : 0);
    const uint32_t flip = f == Q8_0 ? each(0x80) : 0;  // to unsigned, zero point 128
    scatter(words(codes) ^ flip, lane, block);
    if (f == Q8_0) scatter(words(codes + 16) ^ flip, lane, block + 256);
    if (five) {
        const uint32_t high = u32(at);
        uint32_t bits = 0;  // four bits at a time, one into each byte
        for (int j = 0; j < 8; j++) bits |= ((high >> 4 * j & 15) * 0x00204081u & each(1)) << j;
        memcpy(block + 256 + 4 * lane, &bits, 4);
    }
    uint8_t* scales = block + FORMATS[f].block - (has_min ? 64 : 32);
    memcpy(scales + 2 * lane, p, 2);
    if (has_min) memcpy(scales + 32 + 2 * lane, p + 2, 2);
}

template <Format f> void pack_codes(const uint8_t* rows, size_t row_bytes, int columns, int k_blocks, uint8_t* tile) {
    constexpr FormatInfo info = FORMATS[f];
    for (int b = 0; b < k_blocks / info.blocks; b++, rows += info.bytes, tile += info.head + info.blocks * info.block)
        for (int lane = 0; lane < columns; lane++) {
            if (info.blocks == 1) pack_small_block(f, rows + lane * row_bytes, lane, tile);
            else pack_k_blocks(f, rows + lane * row_bytes, lane, tile);
        }
}

// Plain values, as many at a time as lie together in the packed layout: pairs of bfloat16, else one.
template <class T> void pack_plain(const uint8_t* rows, size_t row_bytes, int columns, int count, uint8_t* tile) {
    constexpr int AT_ONCE = 64 / sizeof(T);  // a line of each row
    for (int from = 0; from < count; from += AT_ONCE)
        for (int lane = 0; lane < columns; lane++)
            for (int i = from; i < count && i < from + AT_ONCE; i++)
                memcpy(tile + ((size_t)i * 16 + lane) * sizeof(T), rows + lane * row_bytes + (size_t)i * sizeof(T), sizeof(T));
}

void pack_tile(Format f, const uint8_t* rows, size_t row_bytes, int columns, int k, uint8_t* tile) {
    const int blocks = (k + BLOCK - 1) / BLOCK;
    switch (f) {
        case F32: return pack_plain<uint32_t>(rows, row_bytes, columns, k, tile);
        case F16: return pack_plain<uint16_t>(rows, row_bytes, columns, k, tile);
        case BF16:
            pack_plain<uint32_t>(rows, row_bytes, columns, k / 2, tile);
            for (int lane = 0; k % 2 && lane < columns; lane++)
                memcpy(tile + ((size_t)(k / 2) * 16 + lane) * 4, rows + lane * row_bytes + (size_t)(k - 1) * 2, 2);
            return;
        case Q4_0: return pack_codes<Q4_0>(rows, row_bytes, columns, blocks, tile);
        case Q4_1: return pack_codes<Q4_1>(rows, row_bytes, columns, blocks, tile);
        case Q5_0: return pack_codes<Q5_0>(rows, row_bytes, columns, blocks, tile);
        case Q5_1: return pack_codes<Q5_1>(rows, row_bytes, columns, blocks, tile);
        case Q8_0: return pack_codes<Q8_0>(rows, row_bytes, columns, blocks, tile);
        case Q4_K: return pack_codes<Q4_K>(rows, row_bytes, columns, blocks, tile);
        case Q5_K: return pack_codes<Q5_K>(rows, row_bytes, columns, blocks, tile);
        case Q6_K: return pack_codes<Q6_K>(rows, row_bytes, columns, blocks, tile);
        default: return;
    }
}

constexpr size_t SLACK = 8192;  // prefetches run past the end
constexpr size_t LINE = 64;     // where vectors of weights begin

size_t head_bytes(const GridHeader& h) {
    size_t bytes = sizeof h;
    for (int i = 0; i < NUM_SHARED; i++) bytes += lines((size_t)h.counts[i] * 4);
    return bytes;
}

size_t stride_of(Format f, int k_blocks, const GridShape& grid) {
    return on_grid(f) ? grid_blocks(k_blocks, grid) + (size_t)k_blocks * FORMATS[f].block : tile_bytes(f, k_blocks);
}

// The header of a weight on a grid at `offset` in a file, or null.
const GridHeader* header_in(Format f, const Mapping& file, size_t offset) {
    if (!on_grid(f)) return nullptr;
    const auto* h = (const GridHeader*)(file.data + offset);
    bool sound = offset % LINE == 0 && offset <= file.bytes && file.bytes - offset >= sizeof *h;
    for (int i = 0; sound && i < NUM_SHARED; i++) sound = h->counts[i] >= 0;
    if (!sound || h->activation[15] || h->shape.group < 0) throw std::invalid_argument("the weights lie outside of the file");
    return h;
}

}  // namespace

Packed::Packed(Format format, int n, int k, const GridHeader* header)
    : format(format), n(n), k(k), tiles((n + TILE - 1) / TILE), k_blocks((k + BLOCK - 1) / BLOCK),
      grid(header ? header->shape : GridShape{}), begin(header ? head_bytes(*header) : 0),
      tile_stride(stride_of(format, k_blocks, grid)), bytes(begin + tiles * tile_stride) {
    const FormatInfo& info = FORMATS[format];
    if (info.values > 1 && k % info.values) throw std::invalid_argument("k is no multiple of the format's block");
    if (on_grid(format) && k > MAX_GRID_K) throw std::invalid_argument("a row has more columns than native kernels add in 32 bits; use --kernels torch");
}

Packed::Packed(Format format, const uint8_t* rows, size_t row_bytes, int n, int k, int threads) : Packed(format, n, k) {
    std::shared_ptr<void> owner;
    uint8_t* const own = take_huge(bytes + SLACK, owner);
    data = own, memory = owner;
    const auto pack = [&](int t) {
        const uint8_t* from = rows + (size_t)t * TILE * row_bytes;
        const int columns = n - t * TILE < TILE ? n - t * TILE : TILE;
        pack_tile(format, from, row_bytes, columns, k, own + t * tile_stride);
    };
    Team(threads, 1).run([&](Member& member) { member.share((int)tiles, pack); });
}

Packed::Packed(const GridWeight& w, int threads) : Packed(w.format, w.n, w.k, header_of(w).get()) {
    check_values(w);
    std::shared_ptr<void> owner;
    uint8_t* const own = take_huge(bytes + SLACK, owner);
    data = own, memory = owner;
    memcpy(own, header_of(w).get(), sizeof(GridHeader));
    find_shared();
    for (size_t i = 0; i < w.shared.size(); i++)
        if (w.shared[i].second) memcpy((void*)shared[i], w.shared[i].first, w.shared[i].second * 4);
    const auto pack = [&](int t) { pack_grid_tile(w, t * TILE, own + begin + t * tile_stride); };
    Team(threads, 1).run([&](Member& member) { member.share((int)tiles, pack); });
}

std::string Packed::row_rule() const {
    if (!begin) return {};
    const auto* h = (const GridHeader*)data;
    std::string rule((const char*)data, offsetof(GridHeader, shape));
    if (rule.find_first_not_of('\0') == std::string::npos) return {};
    return rule.append((const char*)(h + 1), begin - sizeof *h);
}

void Packed::find_shared() {
    const auto* h = (const GridHeader*)data;
    const uint8_t* at = data + sizeof *h;
    for (int i = 0; i < NUM_SHARED; i++) {
        if (h->counts[i]) shared[i] = at;
        at += lines((size_t)h->counts[i] * 4);
    }
}

Packed::Packed(Format format, std::shared_ptr<const Mapping> file, size_t offset, int n, int k)
    : Packed(format, n, k, header_in(format, *file, offset)) {
    if (n < 1 || k < 1 || offset % LINE || offset > file->bytes || bytes > file->bytes - offset)
        throw std::invalid_argument("the weights lie outside of the file");
    data = file->data + offset, memory = std::move(file);
    if (on_grid(format)) find_shared();
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
