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

// 32 values of one row: unsigned codes, and the scales and minima that turn them into numbers. Each half has its own in
// Q2_K, Q3_K and Q6_K.
struct Codes {
    uint8_t q[32];
    float d = 0, m = 0;         // scale and minimum (of the super-block, in K formats)
    int scale[2] = {1, 1};      // of each half: formats of super-blocks have integers
    int minimum[2] = {0, 0};
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

// Scale i (of 16) of a super-block of Q3_K, whose scales begin at p: 4 bits in one place and 2 in another, less 32.
int8_t three_k_scale(const uint8_t* p, int i) {
    const int low = i < 8 ? p[i] & 15 : p[i - 8] >> 4;
    return (int8_t)((low | (p[8 + i % 4] >> 2 * (i / 4) & 3) << 4) - 32);
}

// Scale b (of 8) of a super-block of IQ4_XS at p, in the same way.
int8_t four_xs_scale(const uint8_t* p, int b) {
    const int low = b % 2 ? p[4 + b / 2] >> 4 : p[4 + b / 2] & 15, high = p[2 + b / 4] >> 2 * (b % 4) & 3;
    return (int8_t)((low | high << 4) - 32);
}

// The scale of MXFP4: 2^(e - 128). It is subnormal for 0 and 1, and 255 is a number like any other here.
float power_of_two(uint8_t e) { return e < 2 ? (e ? 0x1p-127f : 0x1p-128f) : bf16_value((uint16_t)((e - 1) << 7)); }

void read_small(Format f, const uint8_t* p, Codes& c) {
    if (f == MXFP4) {
        c.d = power_of_two(p[0]);
        nibbles(p + 1, c.q);
        for (uint8_t& q : c.q) q = MXFP4_LEVELS[q];
        return;
    }
    c.d = half_value(u16(p));
    if (f == Q8_0) {
        for (int i = 0; i < 32; i++) c.q[i] = (uint8_t)(p[2 + i] + 128);
        return;
    }
    const bool has_min = f == Q4_1 || f == Q5_1, five = f == Q5_0 || f == Q5_1;
    const uint8_t* at = p + (has_min ? 4 : 2);
    if (has_min) c.m = half_value(u16(p + 2));
    nibbles(at + (five ? 4 : 0), c.q);
    if (five) {
        const uint32_t high = u32(at);
        for (int i = 0; i < 32; i++) c.q[i] |= (uint8_t)((high >> i & 1) << 4);
    }
    if (f == IQ4_NL)
        for (uint8_t& q : c.q) q = IQ4_LEVELS[q];
}

// Block b (of 8) of a super-block of 256.
void read_k(Format f, const uint8_t* p, int b, Codes& c) {
    if (f == Q6_K) {
        const uint8_t *low = p + 64 * (b / 4) + 32 * (b % 2), *high = p + 128 + 32 * (b / 4);
        const int shift = 4 * (b % 4 / 2), high_shift = 2 * (b % 4);
        for (int i = 0; i < 32; i++) c.q[i] = (uint8_t)((low[i] >> shift & 15) | (high[i] >> high_shift & 3) << 4);
        for (int h = 0; h < 2; h++) c.scale[h] = (int8_t)p[192 + 2 * b + h];
        c.d = half_value(u16(p + 208));
    } else if (f == Q2_K || f == Q3_K) {
        const uint8_t* codes = p + (f == Q2_K ? 16 : 32) + 32 * (b / 4);
        for (int i = 0; i < 32; i++) c.q[i] = (uint8_t)(codes[i] >> 2 * (b % 4) & 3);
        for (int i = 0; f == Q3_K && i < 32; i++) c.q[i] |= (uint8_t)((p[i] >> b & 1) << 2);
        for (int h = 0; h < 2; h++) {
            const int at = 2 * b + h;
            c.scale[h] = f == Q2_K ? p[at] & 15 : three_k_scale(p + 96, at);
            c.minimum[h] = f == Q2_K ? p[at] >> 4 : 0;
        }
        c.d = half_value(u16(p + (f == Q2_K ? 80 : 108))), c.m = f == Q2_K ? half_value(u16(p + 82)) : 0.0f;
    } else if (f == IQ4_XS) {
        c.d = half_value(u16(p)), c.scale[0] = c.scale[1] = four_xs_scale(p, b);
        nibbles(p + 8 + 16 * b, c.q);
        for (uint8_t& q : c.q) q = IQ4_LEVELS[q];
    } else {
        uint8_t scale, minimum;
        six_bit_scales(p + 4, b, scale, minimum);
        c.d = half_value(u16(p)), c.m = half_value(u16(p + 2));
        c.scale[0] = c.scale[1] = scale, c.minimum[0] = c.minimum[1] = minimum;
        const uint8_t* codes = p + (f == Q5_K ? 48 : 16) + 32 * (b / 2);
        for (int i = 0; i < 32; i++) c.q[i] = b % 2 ? codes[i] >> 4 : codes[i] & 15;
        for (int i = 0; f == Q5_K && i < 32; i++) c.q[i] |= (uint8_t)((p[16 + i] >> b & 1) << 4);
    }
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

// Bit `bit` of each of 32 bytes: the highest bits of a block's codes.
void place_bits(const uint8_t* p, int bit, int lane, uint8_t* to) {
    uint32_t bits = 0;
    for (int j = 0; j < 8; j++) bits |= (u32(p + 4 * j) >> bit & each(1)) << j;
    memcpy(to + 4 * lane, &bits, 4);
}

// Bits `shift` and `shift` + 1 of each of 32 bytes: a pair of bits of a block's codes.
void place_pairs(const uint8_t* p, int shift, int lane, uint8_t* to) {
    for (int h = 0; h < 2; h++) {
        uint32_t bits = 0;
        for (int j = 0; j < 4; j++) bits |= (u32(p + 16 * h + 4 * j) >> shift & each(3)) << 2 * j;
        memcpy(to + 64 * h + 4 * lane, &bits, 4);
    }
}

// Where a super-block has its float16 scale, and the minimum's behind it if it has one.
int super_scale(Format f) { return f == Q6_K ? 208 : f == Q3_K ? 108 : f == Q2_K ? 80 : 0; }
bool super_minimum(Format f) { return f == Q4_K || f == Q5_K || f == Q2_K; }

// The super-block of 256 at p into column `lane` of a group of blocks. Not inlined: GCC 12 with -O3 loses the loop over lanes
// of IQ4_XS when it is (-fno-ivopts keeps it).
template <Format f> __attribute__((noinline)) void pack_k_blocks(const uint8_t* p, int lane, uint8_t* head) {
    constexpr FormatInfo info = FORMATS[f];
    memcpy(head + 2 * lane, p + super_scale(f), 2);
    if (super_minimum(f)) memcpy(head + 32 + 2 * lane, p + super_scale(f) + 2, 2);
    for (int b = 0; b < 8; b++) {
        uint8_t* block = head + info.head + b * info.block;
        uint8_t* scales = block + info.block - (f == IQ4_XS ? 16 : 32) + lane;
        if (f == Q6_K) {
            place_nibbles(p + 64 * (b / 4) + 32 * (b % 2), b % 4 / 2, lane, block);
            place_pairs(p + 128 + 32 * (b / 4), 2 * (b % 4), lane, block + 256);
            scales[0] = p[192 + 2 * b], scales[16] = p[192 + 2 * b + 1];
        } else if (f == Q2_K) {
            place_pairs(p + 16 + 32 * (b / 4), 2 * (b % 4), lane, block);
            scales[0] = p[2 * b], scales[16] = p[2 * b + 1];
        } else if (f == Q3_K) {
            place_pairs(p + 32 + 32 * (b / 4), 2 * (b % 4), lane, block);
            place_bits(p, b, lane, block + 128);
            for (int h = 0; h < 2; h++) scales[16 * h] = (uint8_t)three_k_scale(p + 96, 2 * b + h);
        } else if (f == IQ4_XS) {
            scatter(words(p + 8 + 16 * b), lane, block);
            scales[0] = (uint8_t)four_xs_scale(p, b);
        } else {
            place_nibbles(p + (f == Q5_K ? 48 : 16) + 32 * (b / 2), b % 2, lane, block);
            if (f == Q5_K) place_bits(p + 16, b, lane, block + 256);
            six_bit_scales(p + 4, b, scales[0], scales[16]);
        }
    }
}

// Formats whose block of 32 is one stored block. Codes i and i + 16 already share a byte, so four bytes are a lane's k-quad
// as they are.
template <Format f> void pack_small_block(const uint8_t* p, int lane, uint8_t* block) {
    if (f == MXFP4) {
        scatter(words(p + 1), lane, block);
        block[256 + lane] = p[0];
        return;
    }
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
            if constexpr (info.blocks == 1) pack_small_block<f>(rows + lane * row_bytes, lane, tile);
            else pack_k_blocks<f>(rows + lane * row_bytes, lane, tile);
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
        case Q2_K: return pack_codes<Q2_K>(rows, row_bytes, columns, blocks, tile);
        case Q3_K: return pack_codes<Q3_K>(rows, row_bytes, columns, blocks, tile);
        case IQ4_NL: return pack_codes<IQ4_NL>(rows, row_bytes, columns, blocks, tile);
        case IQ4_XS: return pack_codes<IQ4_XS>(rows, row_bytes, columns, blocks, tile);
        case MXFP4: return pack_codes<MXFP4>(rows, row_bytes, columns, blocks, tile);
        default: return;
    }
}

float zero_point(Format f) {
    switch (f) {
        case Q3_K: return 4.0f;
        case Q4_0: return 8.0f;
        case Q5_0: case MXFP4: return 16.0f;
        case Q6_K: return 32.0f;
        case Q8_0: case IQ4_NL: case IQ4_XS: return 128.0f;
        default: return 0.0f;
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
    if (f == ATOM) return atom_tile(k_blocks, grid);
    return on_grid(f) ? grid_blocks(k_blocks, grid) + (size_t)k_blocks * FORMATS[f].block : tile_bytes(f, k_blocks);
}

bool fits(Format f, int k, const GridShape& s) {
    const bool grouped = s.zeros || f == ATOM;
    return s.group >= (grouped ? 1 : 0) && s.outliers >= 0 && s.outliers <= k / BLOCK && s.biases >= 0;
}

// The header of a weight on a grid at `offset` in a file, or null.
const GridHeader* header_in(Format f, int k, const Mapping& file, size_t offset) {
    if (!on_grid(f)) return nullptr;
    const auto* h = (const GridHeader*)(file.data + offset);
    bool sound = offset % LINE == 0 && offset <= file.bytes && file.bytes - offset >= sizeof *h;
    for (int i = 0; sound && i < NUM_SHARED; i++) sound = h->counts[i] >= 0;
    if (!sound || h->activation[15] || !fits(f, k, h->shape)) throw std::invalid_argument("the weights lie outside of the file");
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
    const auto pack = [&](int t) { pack_grid_tile(w, grid, t * TILE, own + begin + t * tile_stride); };
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
    : Packed(format, n, k, header_in(format, k, *file, offset)) {
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
    const float zero = zero_point(f);
    const bool super = FORMATS[f].blocks > 1;
    for (int b = 0; b < k / 32; b++) {
        Codes c;
        read_block(f, row, b, c);
        for (int i = 0; i < 32; i++) {
            const float q = (float)c.q[i] - zero;
            const float y = q * (c.d * (float)c.scale[i / 16]);
            if (super) out[32 * b + i] = super_minimum(f) ? y - c.m * (float)c.minimum[i / 16] : y;
            else out[32 * b + i] = f == Q4_1 || f == Q5_1 ? y + c.m : y;
        }
    }
}

}  // namespace dovetail
