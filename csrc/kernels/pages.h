// What is kept of a page of keys, and how a group's queries score against it.
#pragma once
#include "../kernels.h"
#include "rows.h"

namespace {

using dovetail::PageScores;
using dovetail::PageTiles;

template <bool WIDE> INLINE F partial(F acc, const void* summary, const void* q, int at) {
    if (WIDE) return fma(load((const float*)summary + at), load((const float*)q + at), acc);
    return dot_bf16(acc, iload((const uint16_t*)summary + at), iload((const uint16_t*)q + at));
}

// The best score of R queries against one page: the products of n values each.
template <bool WIDE, int R> INLINE float best_of(const PageScores& args, const uint8_t* summary, int row) {
    constexpr int STEP = WIDE ? 16 : 32, SIZE = WIDE ? 4 : 2;
    F acc[R];
    UNROLL for (int r = 0; r < R; r++) acc[r] = zero();
    for (int at = 0; at < args.n; at += STEP)
        UNROLL for (int r = 0; r < R; r++)
            acc[r] = partial<WIDE>(acc[r], summary, (const uint8_t*)args.q + (size_t)(row + r) * args.n * SIZE, at);
    float most = sum(acc[0]);
    UNROLL for (int r = 1; r < R; r++) {
        const float s = sum(acc[r]);
        most = s > most ? s : most;
    }
    return most;
}

template <bool WIDE> void page_scores(const PageScores& args) {
    constexpr int AHEAD = 4;  // pages that are fetched before they are needed
    const size_t bytes = (size_t)args.n * (WIDE ? 4 : 2);
    for (int p = 0; p < args.count; p++) {
        const uint8_t* summary = args.summaries + args.pages[p] * args.stride;
        if (p + AHEAD < args.count) {
            const uint8_t* next = args.summaries + args.pages[p + AHEAD] * args.stride;
            for (size_t b = 0; b < bytes; b += 64) prefetch(next + b);
        }
        float most = -__builtin_inff();
        int row = 0;
        for (; row + 4 <= args.rows; row += 4) {
            const float s = best_of<WIDE, 4>(args, summary, row);
            most = s > most ? s : most;
        }
        for (; row < args.rows; row++) {
            const float s = best_of<WIDE, 1>(args, summary, row);
            most = s > most ? s : most;
        }
        args.out[p] = most;
    }
}

// Dimension d of a tile's sixteen keys.
template <bool WIDE> INLINE F keys_at(const uint8_t* tile, int d) {
    if (WIDE) return load((const float*)tile + 16 * d);
    const I pairs = iload(tile + 64 * (d / 2));
    return as_float(d % 2 ? iand(pairs, iall((int)0xffff0000)) : left32<16>(pairs));
}

template <bool WIDE> INLINE void put(void* to, int d, float x) {
    if (WIDE) {
        ((float*)to)[d] = x;
    } else {
        const I r = round_bf16(all(x));
        alignas(64) int32_t lanes[16];
        istore(lanes, r);
        ((uint16_t*)to)[d] = (uint16_t)lanes[0];
    }
}

// Maximum and minimum of each dimension over the tiles' keys, first [n] and then [n].
template <bool WIDE> void page_bounds(const PageTiles& page, void* out) {
    for (int d = 0; d < page.n; d++) {
        F high = keys_at<WIDE>(page.keys, d), low = high;
        for (int i = 1; i < page.tiles; i++) {
            const F x = keys_at<WIDE>(page.keys + i * page.tile_bytes, d);
            high = max(high, x), low = min(low, x);
        }
        put<WIDE>(out, d, highest(high));
        put<WIDE>(out, page.n + d, -highest(sub(zero(), low)));
    }
}

// Mean and standard deviation.
template <bool WIDE> void page_moments(const PageTiles& page, void* out) {
    const float each = 1.0f / (float)(16 * page.tiles);
    for (int d = 0; d < page.n; d++) {
        F total = zero(), squares = zero();
        for (int i = 0; i < page.tiles; i++) total = add(total, keys_at<WIDE>(page.keys + i * page.tile_bytes, d));
        const float mean = sum(total) * each;
        for (int i = 0; i < page.tiles; i++) {
            const F x = sub(keys_at<WIDE>(page.keys + i * page.tile_bytes, d), all(mean));
            squares = fma(x, x, squares);
        }
        put<WIDE>(out, d, mean);
        put<WIDE>(out, page.n + d, __builtin_sqrtf(sum(squares) * each));
    }
}

inline void add_pages(dovetail::Kernels& k) {
    k.page_scores[dovetail::KV_F32] = page_scores<true>, k.page_scores[dovetail::KV_BF16] = page_scores<false>;
    k.summarise[dovetail::BOUND][dovetail::KV_F32] = page_bounds<true>;
    k.summarise[dovetail::BOUND][dovetail::KV_BF16] = page_bounds<false>;
    k.summarise[dovetail::MEAN_STD][dovetail::KV_F32] = page_moments<true>;
    k.summarise[dovetail::MEAN_STD][dovetail::KV_BF16] = page_moments<false>;
}

}  // namespace
