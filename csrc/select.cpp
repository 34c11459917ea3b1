#include "select.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace dovetail {

namespace {

constexpr int PART = 256;  // pages that one piece of work scores

size_t summary_bytes(const KVMemory& kv) { return (size_t)2 * kv.padded() * kv.element(); }

// Both halves of a query [n], one after the other: see Summary.
template <class T> void halve(const T* q, int n, Summary kind, T* out) {
    constexpr T SIGN = (T)1 << (sizeof(T) * 8 - 1);
    for (int i = 0; i < n; i++) {
        const bool below = q[i] & SIGN;
        out[i] = kind == MEAN_STD ? q[i] : below ? 0 : q[i];
        out[n + i] = kind == MEAN_STD ? (T)(q[i] & ~SIGN) : below ? q[i] : 0;
    }
}

}  // namespace

bool Selection::build(const std::vector<Span>& spans, const Heads& heads, int page_size, const Sparsity& sparsity) {
    heads_ = heads, page_size_ = page_size, unread_ = 0;
    rows_.clear(), parts_.clear(), sequences_.clear();
    for (const Span& span : spans) add(span, sparsity);
    if (rows_.empty()) return false;
    size_t lists = 0, scores = 0;
    for (Row& r : rows_) {
        r.list = lists, r.scores = scores;
        lists += (size_t)r.listed * heads.kv, scores += (size_t)r.eligible * heads.kv;
        unread_ += r.eligible - r.count;
        for (int p = 0; p < r.eligible; p += PART)
            parts_.push_back({(int)(&r - rows_.data()), p, std::min(p + PART, r.eligible)});
    }
    lists_.resize(lists), positions_.resize(lists), scores_.resize(scores);
    size_t next = 0;
    const bool positions = sparsity.positions || heads.kv == 1;  // which also keep a single list from being shared
    for (Sequence& s : sequences_) {
        if (s.pages) continue;
        const size_t list = rows_[next++].list;
        s.pages = lists_.data() + list;
        if (positions) s.page_positions = positions_.data() + list;
    }
    return true;
}

// A span's rows that read everything, as one sequence, and each other one as a sequence of its own.
void Selection::add(const Span& span, const Sparsity& sparsity) {
    int dense = 0;
    for (int i = 0; i < span.rows; i++) {
        const int position = span.start + i, pages = position / page_size_ + 1;
        const int may = position < span.dense_until ? 0 : std::max(0, position + 1 - sparsity.window) / page_size_;
        const int count = sparsity.leading >= 0 ? sparsity.leading : std::max(0, sparsity.budget - (pages - may));
        if (count >= may) {
            dense = i + 1;  // once a row chooses, all later ones do: what they leave out only grows
            continue;
        }
        const int listed = count + pages - may;
        rows_.push_back({span.row + i, may, count, listed, span.pages, 0, 0});
        const int length = (listed - 1) * page_size_ + position % page_size_ + 1;
        sequences_.push_back({span.row + i, 1, position, length, nullptr, listed, heads_.kv, nullptr});
    }
    if (dense) {
        const int length = span.start + dense;
        sequences_.push_back({span.row, dense, span.start, length, span.pages, (length + page_size_ - 1) / page_size_, 1,
                              nullptr});
    }
}

void Selection::prepare(const KVMemory& kv, int threads) {
    scratch_.resize(threads);
    int most = 0;
    for (const Row& r : rows_) most = std::max(most, r.eligible);
    for (Scratch& s : scratch_) {
        s.q.resize((size_t)heads_.group() * summary_bytes(kv));
        if (s.keys.size() < (size_t)most) s.keys.resize(most);
    }
}

void Selection::pick(Member& member, const Kernels& kernels, const PickArgs& args) {
    Scratch& mine = scratch_[member.id];
    const bool scored = args.summaries != nullptr;
    if (scored) member.share((int)parts_.size(), [&](int i) { score(parts_[i], kernels, args, mine); });
    member.share((int)rows_.size() * heads_.kv,
                 [&](int i) { choose(rows_[i / heads_.kv], i % heads_.kv, scored, mine); });
}

void Selection::score(const Part& part, const Kernels& kernels, const PickArgs& args, Scratch& mine) {
    const Row& r = rows_[part.row];
    const KVMemory& kv = *args.kv;
    const int padded = kv.padded(), group = heads_.group();
    const size_t bytes = summary_bytes(kv);
    for (int h = 0; h < heads_.kv; h++) {
        for (int g = 0; g < group; g++) {
            const size_t from = ((size_t)r.row * heads_.query + h * group + g) * padded;
            uint8_t* to = mine.q.data() + g * bytes;
            if (kv.compute() == KV_BF16) halve((const uint16_t*)args.q + from, padded, args.kind, (uint16_t*)to);
            else halve((const uint32_t*)args.q + from, padded, args.kind, (uint32_t*)to);
        }
        float* out = scores_.data() + r.scores + (size_t)h * r.eligible + part.first;
        kernels.page_scores[kv.compute()]({mine.q.data(), group, 2 * padded, args.summaries + h * bytes,
                                           heads_.kv * bytes, r.pages + part.first, part.last - part.first, out});
    }
}

void Selection::choose(const Row& row, int head, bool scored, Scratch& mine) {
    int32_t* list = lists_.data() + row.list + (size_t)head * row.listed;
    int32_t* positions = positions_.data() + row.list + (size_t)head * row.listed;
    const float* scores = scores_.data() + row.scores + (size_t)head * row.eligible;
    if (scored) largest(scores, row.eligible, row.count, mine.keys.data(), list);
    else for (int i = 0; i < row.count; i++) list[i] = i;
    for (int i = row.count; i < row.listed; i++) list[i] = row.eligible + i - row.count;
    for (int i = 0; i < row.listed; i++) positions[i] = list[i] * page_size_, list[i] = row.pages[list[i]];
}

// A radix select on the bits of the scores, in an order in which unsigned numbers compare as the floats do.
void largest(const float* scores, int n, int count, uint32_t* keys, int32_t* out) {
    if (count <= 0) return;
    for (int i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, &scores[i], 4);
        const uint32_t order = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
        keys[i] = scores[i] != scores[i] ? 0 : order;
    }
    constexpr int SHIFTS[3] = {21, 10, 0}, WIDTH = 11;
    uint32_t prefix = 0, known = 0, histogram[1 << WIDTH];
    int left = std::min(count, n);  // to be taken among those that begin with the prefix
    for (int pass = 0; pass < 3; pass++) {
        const int shift = SHIFTS[pass], bits = pass == 2 ? 10 : WIDTH;
        const uint32_t low = (1u << bits) - 1;
        memset(histogram, 0, sizeof histogram);
        for (int i = 0; i < n; i++)
            if ((keys[i] & known) == prefix) histogram[keys[i] >> shift & low]++;
        uint32_t b = low;
        while ((int)histogram[b] < left) left -= histogram[b--];
        prefix |= b << shift, known |= low << shift;
        if ((int)histogram[b] == left) break;
    }
    int taken = 0;
    for (int i = 0; i < n && taken < count; i++) {
        const uint32_t k = keys[i] & known;
        if (k > prefix || (k == prefix && left-- > 0)) out[taken++] = i;
    }
}

void summarise(Member& member, const Kernels& kernels, const KVMemory& kv, Summary kind, int layers,
               const std::vector<int64_t>& pages, uint8_t* out) {
    const int n = (int)pages.size();
    const size_t bytes = summary_bytes(kv);
    member.share(n * layers, [&](int i) {
        const int64_t page = pages[i % n] + (i / n) * kv.pages_per_layer;
        for (int h = 0; h < kv.heads; h++)
            kernels.summarise[kind][kv.compute()](
                {kv.k + kv.tile(page, h, 0), kv.tile_bytes(), kv.page_size / 16, kv.padded()},
                out + ((size_t)page * kv.heads + h) * bytes);
    });
}

}  // namespace dovetail
