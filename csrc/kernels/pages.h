// How a page of keys is summarised, and how the queries of a group are scored with it.
#pragma once
#include "../kernels.h"
#include "rows.h"

namespace {

using dovetail::LandmarkLogits;
using dovetail::PageScores;
using dovetail::PageTiles;
using dovetail::SoftmaxScores;

template <bool WIDE> INLINE F partial(F acc, const void* summary, const void* q, int at) {
    if (WIDE) return fma(load((const float*)summary + at), load((const float*)q + at), acc);
    return dot_bf16(acc, iload((const uint16_t*)summary + at), iload((const uint16_t*)q + at));
}

// Sixteen values of the compute type.
template <bool WIDE> INLINE F values(const void* p, int at) {
    if (WIDE) return load((const float*)p + at);
    return bf16((const uint16_t*)p + at);
}

// acc[p][r]: products of n values of R queries, `row` bytes apart, with P vectors. Rows that do not exist repeat the first
// one.
template <bool WIDE, int P, int R>
INLINE void products(const uint8_t* const* vectors, const uint8_t* q, size_t row, int n, F (&acc)[P][4]) {
    constexpr int STEP = WIDE ? 16 : 32;
    UNROLL for (int p = 0; p < P; p++)
        UNROLL for (int r = 0; r < R; r++) acc[p][r] = zero();
    int at = 0;
    for (; at + STEP <= n; at += STEP)
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int p = 0; p < P; p++) acc[p][r] = partial<WIDE>(acc[p][r], vectors[p], q + r * row, at);
    if (at < n)
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int p = 0; p < P; p++)
                acc[p][r] = fma(values<WIDE>(vectors[p], at), values<WIDE>(q + r * row, at), acc[p][r]);
    UNROLL for (int p = 0; p < P; p++)
        UNROLL for (int r = R; r < 4; r++) acc[p][r] = acc[p][0];
}

// best[p]: at least the products with page p's summary.
template <bool WIDE, int P, int R>
INLINE void score_pages(const uint8_t* const* summaries, const uint8_t* q, int n, float* best) {
    F acc[P][4];
    products<WIDE, P, R>(summaries, q, (size_t)n * (WIDE ? 4 : 2), n, acc);
    best_sums(acc, best);
}

// Scores the rows of a head and raises best[p] where a chunk scores higher. The summaries move on to the next chunk.
template <bool WIDE, int P> INLINE void score_chunk(const uint8_t** summaries, const PageScores& args, const uint8_t* q,
                                                    float* best) {
    const size_t row = (size_t)args.n * (WIDE ? 4 : 2);
    int r = 0;
    for (; r + 4 <= args.rows; r += 4) score_pages<WIDE, P, 4>(summaries, q + r * row, args.n, best);
    switch (args.rows - r) {
        case 3: score_pages<WIDE, P, 3>(summaries, q + r * row, args.n, best); break;
        case 2: score_pages<WIDE, P, 2>(summaries, q + r * row, args.n, best); break;
        case 1: score_pages<WIDE, P, 1>(summaries, q + r * row, args.n, best); break;
    }
    UNROLL for (int p = 0; p < P; p++) summaries[p] += row;
}

constexpr int AHEAD = 16;  // pages whose summaries are fetched before they are needed

// P pages from the first on, all heads; meanwhile later ones are fetched.
template <bool WIDE, int P> INLINE void score_heads(const PageScores& args, int first) {
    const size_t row = (size_t)args.n * (WIDE ? 4 : 2), bytes = args.chunks * row, page = args.heads * bytes;
    const uint8_t *summaries[P], *next[P];
    UNROLL for (int p = 0; p < P; p++) {
        const int later = first + p + AHEAD;
        summaries[p] = args.summaries + args.pages[first + p] * page;
        next[p] = later < args.listed ? args.summaries + args.pages[later] * page : summaries[p];
    }
    for (int h = 0; h < args.heads; h++) {
        UNROLL for (int p = 0; p < P; p++)
            for (size_t b = 0; b < bytes; b += 64) prefetch_far(next[p] + h * bytes + b);
        float best[P];
        UNROLL for (int p = 0; p < P; p++) best[p] = -__builtin_inff();
        for (int c = 0; c < args.chunks; c++)
            score_chunk<WIDE, P>(summaries, args, (const uint8_t*)args.q + h * args.rows * row, best);
        UNROLL for (int p = 0; p < P; p++) args.out[h * args.out_stride + first + p] = best[p];
    }
}

// Fetches the first pages, of so many bytes each, if no earlier call has fetched them.
INLINE void fetch_first(const PageScores& args, size_t page) {
    for (int p = 0; !args.follows && p < AHEAD && p < args.listed; p++)
        for (size_t b = 0; b < page; b += 64) prefetch_far(args.summaries + args.pages[p] * page + b);
}

template <bool WIDE> void page_scores(const PageScores& args) {
    fetch_first(args, (size_t)args.heads * args.chunks * args.n * (WIDE ? 4 : 2));
    int p = 0;
    for (; p + PAGES_MANY <= args.count; p += PAGES_MANY) score_heads<WIDE, PAGES_MANY>(args, p);
    for (; p < args.count; p++) score_heads<WIDE, 1>(args, p);
}

// ---- codes

// The highest products of R queries with a page's keys, token by token. low: [R][P], the products with what all keys of the
// page share. Queries times steps are rounded to bytes, so that their products with codes are summed exactly.
template <bool WIDE, int P, int R>
INLINE F code_page(const uint8_t* page, const uint8_t* q, const float* low, const PageScores& args) {
    const size_t vector = (size_t)args.n * (WIDE ? 4 : 2), row = dovetail::code_query(args.n, WIDE ? 4 : 2);
    const size_t unit = row - dovetail::CODE_UNIT;
    const uint8_t *steps = page + vector, *codes = steps + vector;
    alignas(64) int8_t scaled[R][dovetail::MAX_DIM + 16];
    for (int at = 0; at < args.n; at += 32) {
        const I step = bytes_as_16(steps + at);
        UNROLL for (int r = 0; r < R; r++) store_high(scaled[r] + at, iload(q + r * row + vector + 2 * at), step);
    }
    float largest, units[R];
    __builtin_memcpy(&largest, steps + args.n, 4);
    UNROLL for (int r = 0; r < R; r++) __builtin_memcpy(units + r, q + r * row + unit, 4);
    F best = all(-__builtin_inff());
    for (int t = 0; t < args.chunks; t++) {
        I acc[R];
        UNROLL for (int r = 0; r < R; r++) acc[r] = izero();
        for (int b = 0; b < args.n; b += 16, codes += 64) {
            I x = iload(codes);
            const I few = iall(0x03030303);
            pin(x);
            const I fours[4] = {iand(x, few), iand(right32<2>(x), few), iand(right32<4>(x), few), iand(right32<6>(x), few)};
            UNROLL for (int j = 0; j < 4; j++)
                UNROLL for (int r = 0; r < R; r++) {
                    int32_t bytes;
                    __builtin_memcpy(&bytes, scaled[r] + b + 4 * j, 4);
                    acc[r] = dot_small(acc[r], fours[j], iall(bytes));
                }
        }
        UNROLL for (int r = 0; r < R; r++)  // NaN changes nothing
            best = max(fma(to_float(acc[r]), all(largest * units[r]), all(low[r * P])), best);
    }
    return best;
}

template <bool WIDE, int P, int R>
INLINE void code_pages(const uint8_t* const* pages, const uint8_t* q, const PageScores& args, float* best) {
    F acc[P][4];
    alignas(64) float most[P][16];
    float low[4][P], *const lows[4] = {low[0], low[1], low[2], low[3]};
    products<WIDE, P, R>(pages, q, dovetail::code_query(args.n, WIDE ? 4 : 2), args.n, acc);
    all_sums<P, R>(acc, lows);
    ROLLED for (int p = 0; p < P; p++) store(most[p], code_page<WIDE, P, R>(pages[p], q, low[0] + p, args));
    F x[P];
    UNROLL for (int p = 0; p < P; p++) x[p] = load(most[p]);
    raise<P>(x, best);
}

// P pages from the first on, all heads; meanwhile later ones are fetched.
template <bool WIDE, int P> INLINE void code_heads(const PageScores& args, int first) {
    const int n = args.n, element = WIDE ? 4 : 2;
    const size_t head = (size_t)n * (2 * element + 4 * args.chunks), row = dovetail::code_query(n, element);
    const uint8_t *pages[P], *next[P], *q = (const uint8_t*)args.q;
    UNROLL for (int p = 0; p < P; p++) {
        const int later = first + p + AHEAD < args.listed ? first + p + AHEAD : first + p;
        pages[p] = args.summaries + args.pages[first + p] * args.heads * head;
        next[p] = args.summaries + args.pages[later] * args.heads * head;
    }
    for (int h = 0; h < args.heads; h++) {
        UNROLL for (int p = 0; p < P; p++)
            for (size_t b = 0; b < head; b += 64) prefetch_far(next[p] + h * head + b);
        float best[P];
        UNROLL for (int p = 0; p < P; p++) best[p] = -__builtin_inff();
        int r = 0;
        for (; r + 4 <= args.rows; r += 4, q += 4 * row) code_pages<WIDE, P, 4>(pages, q, args, best);
        switch (args.rows - r) {
            case 3: code_pages<WIDE, P, 3>(pages, q, args, best); break;
            case 2: code_pages<WIDE, P, 2>(pages, q, args, best); break;
            case 1: code_pages<WIDE, P, 1>(pages, q, args, best); break;
        }
        q += (args.rows - r) * row;
        UNROLL for (int p = 0; p < P; p++) pages[p] += head, args.out[h * args.out_stride + first + p] = best[p];
    }
}

template <bool WIDE> void code_scores(const PageScores& args) {
    fetch_first(args, (size_t)args.heads * args.n * (2 * (WIDE ? 4 : 2) + 4 * args.chunks));
    int p = 0;
    for (; p + PAGES_MANY <= args.count; p += PAGES_MANY) code_heads<WIDE, PAGES_MANY>(args, p);
    for (; p < args.count; p++) code_heads<WIDE, 1>(args, p);
}

// Logits of P vectors, one of each page, and R queries of a head.
template <bool WIDE, int P, int R>
INLINE void logits_of(const uint8_t* const* vectors, const uint8_t* q, int n, float* const* out) {
    F acc[P][4];
    products<WIDE, P, R>(vectors, q, (size_t)n * (WIDE ? 4 : 2), n, acc);
    all_sums<P, R>(acc, out);
}

// P pages of all heads; meanwhile later ones are fetched.
template <bool WIDE, int P> INLINE void logits_pages(const LandmarkLogits& args, int first) {
    const size_t bytes = (size_t)args.n * (WIDE ? 4 : 2), head = args.vectors * bytes, page = args.heads * head;
    const uint8_t *at[P], *next[P];
    UNROLL for (int p = 0; p < P; p++) {
        const int later = first + p + AHEAD;
        at[p] = args.landmarks + args.pages[first + p] * page;
        next[p] = later < args.count ? args.landmarks + args.pages[later] * page : at[p];
    }
    for (int h = 0; h < args.heads; h++) {
        UNROLL for (int p = 0; p < P; p++)
            for (size_t b = 0; b < head; b += 64) prefetch_far(next[p] + h * head + b);
        for (int v = 0; v < args.vectors; v++) {
            for (int r = 0; r < args.rows; r += 4) {
                float* out[4];
                const int rows = args.rows - r < 4 ? args.rows - r : 4;
                for (int i = 0; i < rows; i++)
                    out[i] = args.out + ((size_t)(h * args.rows + r + i) * args.vectors + v) * args.stride + first;
                const uint8_t* q = (const uint8_t*)args.q + (size_t)(h * args.rows + r) * bytes;
                switch (rows) {
                    case 1: logits_of<WIDE, P, 1>(at, q, args.n, out); break;
                    case 2: logits_of<WIDE, P, 2>(at, q, args.n, out); break;
                    case 3: logits_of<WIDE, P, 3>(at, q, args.n, out); break;
                    default: logits_of<WIDE, P, 4>(at, q, args.n, out);
                }
            }
            UNROLL for (int p = 0; p < P; p++) at[p] += bytes;
        }
    }
}

template <bool WIDE> void landmark_logits(const LandmarkLogits& args) {
    int p = 0;
    for (; p + PAGES_MANY <= args.count; p += PAGES_MANY) logits_pages<WIDE, PAGES_MANY>(args, p);
    for (; p < args.count; p++) logits_pages<WIDE, 1>(args, p);
}

void best_of_sixteen(const float* scores, int n, float* out) {
    const F none = all(-__builtin_inff());
    for (int i = 0; i < n; i++) {
        const F x = load(scores + 16 * i);
        out[i] = highest(choose(not_nan(x), x, none));
    }
}

int margins(const float* best, int rows, int n, float alpha, float* out) {
    const F none = all(-__builtin_inff()), least = all(-alpha);
    for (int i = 0; i < n; i += 16) store(out + i, none);
    for (int r = 0; r < rows; r++, best += n) {
        F high = none;
        for (int i = 0; i < n; i += 16) high = max(high, load(best + i));
        const F top = all(highest(high));
        if (highest(high) == -__builtin_inff()) continue;
        for (int i = 0; i < n; i += 16) store(out + i, max(load(out + i), sub(load(best + i), top)));
    }
    int above = 0;
    for (int i = 0; i < n; i += 16) above += __builtin_popcount(bits(not_less_equal(load(out + i), least)));
    return above;
}

// The softmax of each row of logits, and its highest value for each page. NaN never counts.
void softmax_scores(const SoftmaxScores& args) {
    const F none = all(-__builtin_inff());
    for (int i = 0; i < args.n; i += 16) store(args.out + i, none);
    for (int r = 0; r < args.rows; r++) {
        const float* row = args.logits + (size_t)r * args.vectors * args.stride;
        const int count = args.vectors * args.stride;
        auto at = [&](int i) {
            const F x = load(row + i);
            return choose(not_nan(x), x, none);
        };
        F high = none, total = zero();
        for (int i = 0; i < count; i += 16) high = max(high, at(i));
        const float most = highest(high);
        if (most == -__builtin_inff()) continue;
        for (int i = 0; i < count; i += 16) total = add(total, exponential(sub(at(i), all(most))));
        const F norm = all(most + __builtin_logf(sum(total)));
        for (int i = 0; i < args.n; i += 16) {
            F best = load(args.out + i);
            for (int v = 0; v < args.vectors; v++) best = max(best, sub(at(v * args.stride + i), norm));
            store(args.out + i, best);
        }
    }
}

// ---- the largest of some scores

INLINE int count_from(const float* x, int n, F least) {
    int count = 0;
    for (int i = 0; i < n; i += 16) count += __builtin_popcount(bits(not_less(load(x + i), least)));
    return count;
}

// Floats as integers with the same order, and back.
INLINE int32_t rank_of(float x) {
    int32_t i;
    __builtin_memcpy(&i, &x, 4);
    return i ^ (i >> 31 & 0x7fffffff);
}
INLINE float of_rank(int32_t i) {
    i ^= i >> 31 & 0x7fffffff;
    float x;
    __builtin_memcpy(&x, &i, 4);
    return x;
}

// Bisects for the least of them.
void largest(const float* x, int n, int count, int32_t* out) {
    if (count <= 0) return;
    F high = load(x), low = high;
    for (int i = 16; i < n; i += 16) high = max(high, load(x + i)), low = min(low, load(x + i));
    int64_t from = rank_of(-highest(sub(zero(), low))), to = (int64_t)rank_of(highest(high)) + 1;
    int reached = n;  // at least `from`; fewer than `count` are at least `to`
    while (to - from > 1 && reached > count) {
        const int64_t middle = (from + to) >> 1;
        const int some = count_from(x, n, all(of_rank((int32_t)middle)));
        if (some >= count) from = middle, reached = some;
        else to = middle;
    }
    const float least = of_rank((int32_t)from);
    int equals = count;  // how many are taken of those that equal the least one
    if (reached > count)
        for (int i = 0; i < n; i += 16) equals -= __builtin_popcount(bits(not_less_equal(load(x + i), all(least))));
    for (int i = 0, taken = 0; taken < count; i += 16)
        for (unsigned some = bits(not_less(load(x + i), all(least))); some && taken < count; some &= some - 1) {
            const int at = i + __builtin_ctz(some);
            if (x[at] > least || equals-- > 0) out[taken++] = at;
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

// Dimension d of a page's keys, a tile at a time.
template <bool WIDE> struct Dimension {
    const PageTiles& page;
    const int d;
    int tile = -1;
    alignas(64) float keys[16] = {};
    INLINE float operator()(int t) {
        if (t / 16 != tile) tile = t / 16, store(keys, keys_at<WIDE>(page.keys + tile * page.tile_bytes, d));
        return keys[t % 16];
    }
};

// f(keys, first, count, c, d): dimension d of chunk c, which has `count` keys from the first on.
template <bool WIDE, class Each> INLINE void each_chunk(const PageTiles& page, int chunks, const Each& f) {
    const int count = 16 * page.tiles / chunks;
    for (int d = 0; d < page.n; d++) {
        Dimension<WIDE> keys{page, d};
        for (int c = 0; c < chunks; c++) f(keys, c * count, count, c, d);
    }
}

// Maximum and minimum of each dimension over a chunk's keys, first [n] and then [n].
template <bool WIDE> void page_bounds(const PageTiles& page, int chunks, void* out) {
    each_chunk<WIDE>(page, chunks, [&](auto& key, int first, int count, int c, int d) {
        float high = key(first), low = high;
        for (int t = first + 1; t < first + count; t++) {
            const float x = key(t);
            high = high > x ? high : x, low = low < x ? low : x;
        }
        put<WIDE>(out, 2 * c * page.n + d, high), put<WIDE>(out, (2 * c + 1) * page.n + d, low);
    });
}

template <class Keys> INLINE float mean_of(Keys& key, int first, int count) {
    float total = 0;
    for (int t = first; t < first + count; t++) total += key(t);
    return total / (float)count;
}

// Mean and weighted standard deviation.
template <bool WIDE> void page_moments(const PageTiles& page, int chunks, void* out) {
    each_chunk<WIDE>(page, chunks, [&](auto& key, int first, int count, int c, int d) {
        const float mean = mean_of(key, first, count);
        float squares = 0;
        for (int t = first; t < first + count; t++) squares += (key(t) - mean) * (key(t) - mean);
        const float deviation = __builtin_sqrtf(squares / (float)count);
        put<WIDE>(out, 2 * c * page.n + d, mean), put<WIDE>(out, (2 * c + 1) * page.n + d, page.deviations * deviation);
    });
}

// Means of `vectors` runs of a page's keys, `stride` values apart.
template <bool WIDE> void landmarks(const PageTiles& page, int vectors, int stride, void* out) {
    each_chunk<WIDE>(page, vectors, [&](auto& key, int first, int count, int c, int d) {
        put<WIDE>(out, c * stride + d, mean_of(key, first, count));
    });
}

// The code, 0 to 3. It is 0 where the range is empty.
INLINE I code_of(F key, float low, float step) {
    if (!(step > 0)) return izero();
    const F at = round_even(div(sub(key, all(low)), all(step)));
    return to_int(min(max(at, zero()), all(3.0f)));
}

// Where each key lies between the page's extremes.
template <bool WIDE> void page_codes(const PageTiles& page, int, void* out) {
    alignas(64) float low[dovetail::MAX_DIM], step[dovetail::MAX_DIM];
    uint8_t *steps = (uint8_t*)out + (size_t)page.n * (WIDE ? 4 : 2), *codes = steps + (size_t)page.n * (WIDE ? 4 : 2);
    F most = zero();
    page_bounds<WIDE>(page, 1, out);
    for (int d = 0; d < page.n; d += 16) {
        const F least = values<WIDE>(out, page.n + d), third = div(sub(values<WIDE>(out, d), least), all(3.0f));
        store(low + d, least), store(step + d, third);
        most = max(third, most);
    }
    const float largest = highest(most), part = largest / 255.0f;
    for (int d = 0; d < page.n; d += 16) {
        const F parts = round_even(mul(div(load(step + d), all(largest)), all(255.0f)));
        const F bytes = keep(not_nan(parts), parts);  // 0 where the range is empty or NaN
        for (int i = 0; i < 16; i++) put<WIDE>(out, d + i, low[d + i]), steps[d + i] = (uint8_t)lane(bytes, i);
        store(step + d, mul(bytes, all(part)));
    }
    __builtin_memcpy(steps + page.n, &largest, 4);
    for (int t = 0; t < page.tiles; t++)
        for (int d = 0; d < page.n; d += 16, codes += 64) {
            I packed = izero();
            for (int j = 3; j >= 0; j--) {
                I four = izero();
                for (int i = 3; i >= 0; i--) {
                    const int at = d + 4 * j + i;
                    const F key = keys_at<WIDE>(page.keys + t * page.tile_bytes, at);
                    four = ior(left32<8>(four), code_of(key, low[at], step[at]));
                }
                packed = ior(left32<2>(packed), four);
            }
            istore(codes, packed);
        }
}

template <bool WIDE> void turn_keys(const uint8_t* tile, int dim, const float* basis, int width, uint8_t* out) {
    alignas(64) uint16_t low[16], high[16];
    for (int c = 0; c < width; c += 2) {
        F a = zero(), b = zero();
        for (int d = 0; d < dim; d++) {
            const F k = keys_at<WIDE>(tile, d);
            a = fma(k, all(basis[(size_t)d * width + c]), a), b = fma(k, all(basis[(size_t)d * width + c + 1]), b);
        }
        if (WIDE) {
            store((float*)out + 16 * c, a), store((float*)out + 16 * c + 16, b);
            continue;
        }
        store_bf16(low, a), store_bf16(high, b);
        for (int t = 0; t < 16; t++) {
            ((uint16_t*)out)[16 * c + 2 * t] = low[t];
            ((uint16_t*)out)[16 * c + 2 * t + 1] = high[t];
        }
    }
}

inline void add_pages(dovetail::Kernels& k) {
    k.page_scores[dovetail::BOUND][dovetail::KV_F32] = k.page_scores[dovetail::MEAN_STD][dovetail::KV_F32] = page_scores<true>;
    k.page_scores[dovetail::BOUND][dovetail::KV_BF16] = k.page_scores[dovetail::MEAN_STD][dovetail::KV_BF16] =
        page_scores<false>;
    k.page_scores[dovetail::CODES][dovetail::KV_F32] = code_scores<true>;
    k.page_scores[dovetail::CODES][dovetail::KV_BF16] = code_scores<false>;
    k.summarise[dovetail::CODES][dovetail::KV_F32] = page_codes<true>;
    k.summarise[dovetail::CODES][dovetail::KV_BF16] = page_codes<false>;
    k.best_of_sixteen = best_of_sixteen, k.margins = margins;
    k.landmark_logits[dovetail::KV_F32] = landmark_logits<true>;
    k.landmark_logits[dovetail::KV_BF16] = landmark_logits<false>;
    k.largest = largest, k.softmax_scores = softmax_scores;
    k.turn_keys[dovetail::KV_F32] = turn_keys<true>, k.turn_keys[dovetail::KV_BF16] = turn_keys<false>;
    k.landmarks[dovetail::KV_F32] = landmarks<true>, k.landmarks[dovetail::KV_BF16] = landmarks<false>;
    k.summarise[dovetail::BOUND][dovetail::KV_F32] = page_bounds<true>;
    k.summarise[dovetail::BOUND][dovetail::KV_BF16] = page_bounds<false>;
    k.summarise[dovetail::MEAN_STD][dovetail::KV_F32] = page_moments<true>;
    k.summarise[dovetail::MEAN_STD][dovetail::KV_BF16] = page_moments<false>;
}

}  // namespace
