// Codes of KV: written token by token, decoded tile by tile.
#pragma once
#include "../kernels.h"
#include "attention.h"

namespace {

constexpr float TINY = 1.17549435e-38f;

// e4m3 of |x| at most 448, rounded to nearest even. Below 2^-6 values are multiples of 2^-9.
INLINE I to_e4m3(F x) {
    const I b = as_int(magnitude(x)), odd = iand(right32<20>(b), iall(1));
    const I normal = iadd(right32<20>(iadd(b, iadd(odd, iall(0x7ffff)))), iall(-(120 << 3)));
    const I small = iadd(as_int(add(magnitude(x), all(16384.0f))), iall(-0x46800000));
    const I code = choose(not_less(magnitude(x), all(0.015625f)), normal, small);
    return choose(not_less(x, zero()), code, iadd(code, iall(-128)));
}

// Codes of x [n], one byte each, and the scale and the low that they are meant with. False where they are not finite.
template <KVStored S> INLINE bool encode(const float* x, int n, uint8_t* codes, float* scale, float* low) {
    if (!finite(x, n)) return false;
    F high = load(x), least = high;
    for (int i = 0; i < n; i += 16) {
        const F v = load(x + i);
        high = S == STORE_INT4 ? max(high, v) : max(magnitude(high), magnitude(v)), least = min(least, v);
    }
    *low = S == STORE_INT4 ? -highest(sub(zero(), least)) : 0;
    *scale = (highest(S == STORE_INT4 ? high : magnitude(high)) - *low) / (S == STORE_INT4 ? 15.0f : S == STORE_INT8 ? 127.0f : 448.0f);
    if (!(*scale <= 3.4e38f)) return false;
    const F by = all(*scale > TINY ? *scale : TINY);
    for (int i = 0; i < n; i += 16) {
        const F y = div(sub(load(x + i), all(*low)), by);
        store_bytes(codes + i, S == STORE_FP8 ? to_e4m3(y) : to_int(S == STORE_INT4 ? min(y, all(15.0f)) : y));
    }
    return true;
}

template <KVStored S> void put_keys(const uint8_t* codes, int n, int t, uint8_t* tile) {
    uint8_t* to = tile + 2 * t;
    if (S != STORE_INT4)
        for (int d = 0; d < n; d += 2) __builtin_memcpy(to + 16 * d, codes + d, 2);
    else
        for (int d = 0; d < n; d += 4, to += 32) to[0] = codes[d] | codes[d + 2] << 4, to[1] = codes[d + 1] | codes[d + 3] << 4;
}

// One by one: another thread may write the other token of a pair.
template <KVStored S> void put_values(const uint8_t* codes, int n, int t, uint8_t* tile) {
    if (S != STORE_INT4) {
        uint8_t* to = tile + t / 2 * 2 * n + t % 2;
        for (int d = 0; d < n; d++) to[2 * d] = codes[d];
        return;
    }
    uint8_t* to = tile + t / 2 * ((n + 31) / 32 * 32) + t % 2;
    for (int d = 0; d < n; d += 32, to += 32)
        for (int i = 0; i < 16; i++) to[2 * i] = codes[d + i] | codes[d + 16 + i] << 4;
}

template <KVStored S> bool write_codes(const float* x, int n, int t, bool keys, uint8_t* tile) {
    alignas(64) uint8_t codes[dovetail::MAX_DIM + 32] = {};
    float scale, low;
    if (!encode<S>(x, n, codes, &scale, &low)) return false;
    keys ? put_keys<S>(codes, n, t, tile) : put_values<S>(codes, n, t, tile);
    float* scales = (float*)(tile + dovetail::code_bytes(S, n));
    scales[t] = scale;
    if (S == STORE_INT4) scales[16 + t] = low;
    return true;
}

template <KVStored S> void decode_kv(const uint8_t* codes, int rows, int vectors, uint8_t* out) {
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; codes += 32) {
            istore(out, vector_of<S>(codes, false));
            v++, out += 64;
            if (S != STORE_INT4 || v == vectors) continue;
            istore(out, vector_of<S>(codes, true));
            v++, out += 64;
        }
}

template <KVStored S> void decode_keys(const uint8_t* tile, int n, int dim, uint8_t* out) {
    const float* scales = (const float*)(tile + dovetail::code_bytes(S, n));
    const F scale = load(scales), low = load(scales + (S == STORE_INT4 ? 16 : 0));
    auto value = [&](I code) {
        if (S == STORE_INT4) return round_bf16(add(mul(add(as_float(code), all(8.0f)), scale), low));
        return round_bf16(mul(as_float(code), scale));
    };
    decode_kv<S>(tile, 1, dim / 2, out);
    for (int d = 0; d < n; d += 2, out += 64) {
        const I pair = iload(out);
        istore(out, d < dim ? ior(value(left32<16>(pair)), left32<16>(value(iand(pair, iall((int)0xffff0000))))) : izero());
    }
}

template <KVStored S> void add_codes_of(dovetail::Kernels& k) {
    k.write_codes[S] = write_codes<S>, k.decode[S] = decode_kv<S>, k.decode_keys[S] = decode_keys<S>;
}
inline void add_codes(dovetail::Kernels& k) {
    add_codes_of<STORE_INT8>(k), add_codes_of<STORE_INT4>(k), add_codes_of<STORE_FP8>(k);
}

}  // namespace
