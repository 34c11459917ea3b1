#include "kv.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "small_floats.h"

namespace dovetail {

namespace {

constexpr float LARGEST = 3.38e38f;  // stays finite as bfloat16

bool sound(const float* x, int n) {
    bool ok = true;
    for (int i = 0; i < n; i++) ok &= std::fabs(x[i]) <= LARGEST;
    return ok;
}

// A token's K and V [dim] into column t of its tiles.
struct Column {
    KVType type;
    uint8_t *k, *v;
    int t;
};

void put_column(const Column& to, const KVMemory& kv, const float* k, const float* v) {
    const int n = kv.padded(), t = to.t;
    if (to.type == KV_F32) {
        for (int d = 0; d < kv.dim; d++) ((float*)to.k)[d * 16 + t] = k[d];
        for (int d = kv.dim; d < n; d++) ((float*)to.k)[d * 16 + t] = 0;  // whatever lay here before
        memcpy((float*)to.v + (size_t)t * n, v, (size_t)kv.dim * 4);
        return;
    }
    for (int d = 0; d < n; d++) ((uint16_t*)to.k)[(d / 2) * 32 + t * 2 + d % 2] = d < kv.dim ? to_bf16(k[d]) : 0;
    for (int d = 0; d < kv.dim; d++) ((uint16_t*)to.v)[(size_t)(t / 2) * 2 * n + d * 2 + t % 2] = to_bf16(v[d]);
}

// Symmetric int8: scale = max|x| / 127.
void put_int8(int8_t* codes, float* scale, const float* x, int n) {
    float most = 0;
    for (int i = 0; i < n; i++) most = std::fmax(most, std::fabs(x[i]));
    *scale = most / 127.0f;
    const float by = std::fmax(*scale, 1.17549435e-38f);
    for (int i = 0; i < n; i++) codes[i] = (int8_t)std::nearbyint(x[i] / by);
}

// Asymmetric int4: x ~ minimum + scale * code, two codes a byte, low half first.
void put_int4(uint8_t* codes, float* pair, const float* x, int n) {
    float low = x[0], high = x[0];
    for (int i = 1; i < n; i++) low = std::fmin(low, x[i]), high = std::fmax(high, x[i]);
    pair[0] = (high - low) / 15.0f, pair[1] = low;
    const float by = std::fmax(pair[0], 1.17549435e-38f);
    for (int i = 0; i < n; i += 2) {
        const int a = (int)std::nearbyint((x[i] - low) / by), b = (int)std::nearbyint((x[i + 1] - low) / by);
        codes[i / 2] = (uint8_t)(a | b << 4);
    }
}

// e4m3: scale = max|x| / 448.
void put_fp8(uint8_t* codes, float* scale, const float* x, int n) {
    float most = 0;
    for (int i = 0; i < n; i++) most = std::fmax(most, std::fabs(x[i]));
    *scale = most / 448.0f;
    const float by = std::fmax(*scale, 1.17549435e-38f);
    for (int i = 0; i < n; i++) codes[i] = to_e4m3(x[i] / by);
}

void put_vector(const KVMemory& kv, uint8_t* base, float* scales, size_t at, const float* x) {
    const size_t n = kv.dim;
    if (kv.stored == STORE_F32) memcpy(base + at * n * 4, x, n * 4);
    else if (kv.stored == STORE_BF16)
        for (size_t i = 0; i < n; i++) ((uint16_t*)base)[at * n + i] = to_bf16(x[i]);
    else if (kv.stored == STORE_INT8) put_int8((int8_t*)base + at * n, scales + at, x, (int)n);
    else if (kv.stored == STORE_FP8) put_fp8(base + at * n, scales + at, x, (int)n);
    else put_int4(base + at * n / 2, scales + 2 * at, x, (int)n);
}

// A stored vector as float32.
void get_vector(const KVMemory& kv, const uint8_t* base, const float* scales, size_t at, float* out) {
    const size_t n = kv.dim;
    if (kv.stored == STORE_F32) {
        memcpy(out, base + at * n * 4, n * 4);
    } else if (kv.stored == STORE_BF16) {
        for (size_t d = 0; d < n; d++) out[d] = bf16_value(((const uint16_t*)base)[at * n + d]);
    } else if (kv.stored == STORE_INT8) {
        for (size_t d = 0; d < n; d++) out[d] = (float)((const int8_t*)base)[at * n + d] * scales[at];
    } else if (kv.stored == STORE_FP8) {
        for (size_t d = 0; d < n; d++) out[d] = e4m3_value(base[at * n + d]) * scales[at];
    } else {
        const uint8_t* codes = base + at * n / 2;
        const float scale = scales[2 * at], low = scales[2 * at + 1];
        for (size_t d = 0; d < n; d += 2) {
            out[d] = (float)(codes[d / 2] & 15) * scale + low;
            out[d + 1] = (float)(codes[d / 2] >> 4) * scale + low;
        }
    }
}

// One token into its tiles; false where something is not finite.
bool write_tiles(const Kernels& kernels, const KVMemory& kv, size_t at, int t, const float* k, const float* v) {
    if (kv.dim == kv.padded()) return kernels.write_bf16(k, v, kv.dim, t, kv.k + at, kv.v + at);
    alignas(64) float both[2][512] = {};
    memcpy(both[0], k, kv.dim * 4), memcpy(both[1], v, kv.dim * 4);
    return kernels.write_bf16(both[0], both[1], kv.padded(), t, kv.k + at, kv.v + at);
}

// One token into its tiles of codes. What is beyond its dimensions repeats a value, so that it changes no scale.
void write_coded(const Kernels& kernels, const KVMemory& kv, size_t at, int t, const float* k, const float* v) {
    alignas(64) float both[2][MAX_DIM] = {};
    const int n = kv.padded();
    if (kv.dim < n) {
        std::fill(both[0], both[0] + n, k[0]), std::fill(both[1], both[1] + n, v[0]);
        memcpy(both[0], k, kv.dim * 4), memcpy(both[1], v, kv.dim * 4);
        k = both[0], v = both[1];
    }
    const auto write = kernels.write_codes[kv.stored];
    if (write(k, n, t, true, kv.k + at) && write(v, n, t, false, kv.v + at)) return;
    memset(both, 0, sizeof both);
    write(both[0], n, t, true, kv.k + at), write(both[0], n, t, false, kv.v + at);
    ((float*)(kv.k + at + code_bytes(kv.stored, n)))[t] = NAN;
}

}  // namespace

void write_token(const Kernels& kernels, const KVMemory& kv, const TokenPlace& place, const float* k, const float* v) {
    const auto [page, head, offset] = place;
    const size_t tile = kv.layout == TILED ? kv.tile(page, head, offset / 16) : 0;
    if (kv.layout == TILED && kv.coded()) return write_coded(kernels, kv, tile, offset % 16, k, v);
    if (kv.layout == TILED && kv.stored == STORE_BF16 && write_tiles(kernels, kv, tile, offset % 16, k, v)) return;
    float broken[1024], none[1024];
    if (!sound(k, kv.dim) || !sound(v, kv.dim)) {
        for (int i = 0; i < kv.dim; i++) broken[i] = NAN, none[i] = 0;
        k = broken, v = none;
        if (kv.coded()) {
            put_vector(kv, kv.v, kv.v_scale, kv.vector(page, head, offset), none);
            const size_t at = kv.vector(page, head, offset);
            put_vector(kv, kv.k, kv.k_scale, at, none);
            kv.k_scale[kv.stored == STORE_INT4 ? 2 * at : at] = NAN;
            return;
        }
    }
    if (kv.layout == TILED) {
        put_column({kv.compute(), kv.k + tile, kv.v + tile, offset % 16}, kv, k, v);
        return;
    }
    const size_t at = kv.vector(page, head, offset);
    put_vector(kv, kv.k, kv.k_scale, at, k);
    put_vector(kv, kv.v, kv.v_scale, at, v);
}

void gather_tokens(const KVMemory& kv, int64_t page, int head, int first, int count, int at, uint8_t* k, uint8_t* v) {
    const size_t tile = kv.tile_bytes();
    float k_row[512], v_row[512];
    for (int i = 0; i < count; i++) {
        const size_t from = kv.vector(page, head, first + i);
        get_vector(kv, kv.k, kv.k_scale, from, k_row), get_vector(kv, kv.v, kv.v_scale, from, v_row);
        if (!sound(v_row, kv.dim))  // as write_token stores it
            for (int d = 0; d < kv.dim; d++) k_row[d] = NAN, v_row[d] = 0;
        put_column({kv.compute(), k + tile * ((at + i) / 16), v + tile * ((at + i) / 16), (at + i) % 16}, kv, k_row, v_row);
    }
}

const uint8_t* page_keys(const Kernels& kernels, const KVMemory& kv, int64_t page, int head, std::vector<uint8_t>& room) {
    if (!kv.coded()) return kv.k + kv.tile(page, head, 0);
    const size_t tile = kv.tile_bytes();
    room.resize((size_t)(kv.page_size / 16) * tile);
    for (int i = 0; i < kv.page_size / 16; i++)
        kernels.decode_keys[kv.stored](kv.k + kv.tile(page, head, i), kv.padded(), kv.dim, room.data() + i * tile);
    return room.data();
}

void encode_keys(const Kernels& kernels, const KVMemory& kv, const uint8_t* keys, uint8_t* out) {
    alignas(64) float x[MAX_DIM];
    const int n = kv.padded();
    for (int t = 0; t < kv.page_size; t++) {
        const uint16_t* tile = (const uint16_t*)(keys + t / 16 * kv.tile_bytes());
        uint8_t* to = out + t / 16 * kv.stored_tile();
        for (int d = 0; d < n; d++) x[d] = d < kv.dim ? bf16_value(tile[d / 2 * 32 + t % 16 * 2 + d % 2]) : x[0];
        if (kernels.write_codes[kv.stored](x, n, t % 16, true, to)) continue;
        memset(x, 0, sizeof x);
        kernels.write_codes[kv.stored](x, n, t % 16, true, to);
        ((float*)(to + code_bytes(kv.stored, n)))[t % 16] = NAN;
    }
}

}  // namespace dovetail
