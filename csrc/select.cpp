#include "select.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace dovetail {

namespace {

constexpr int PART = 64;  // pages that one piece of work scores

size_t summary_bytes(const KVMemory& kv) { return (size_t)2 * kv.padded() * kv.element(); }

// Both halves of a query [n], one after the other: see Summary.
template <class T> void halve_query(const T* q, int n, Summary kind, T* out) {
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
        lists += (size_t)r.listed * heads.kv, scores += (size_t)r.stride() * heads.kv;
        unread_ += r.eligible - r.count;
        for (int p = 0; p < r.eligible; p += PART)
            parts_.push_back({(int)(&r - rows_.data()), p, std::min(p + PART, r.eligible)});
    }
    lists_.resize(lists), positions_.resize(lists), scores_.resize(scores);
    for (const Row& r : rows_)  // what is beyond a head's scores is never among the largest
        for (int h = 1; h <= heads.kv; h++)
            for (int p = r.eligible - r.stride(); p < 0; p++) scores_[r.scores + h * r.stride() + p] = -INFINITY;
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
    for (Scratch& s : scratch_) s.q.resize((size_t)heads_.query * summary_bytes(kv));
}

void Selection::pick(Member& member, const Kernels& kernels, const PickArgs& args) {
    Scratch& mine = scratch_[member.id];
    const bool scored = args.summaries != nullptr;
    mine.row = -1, mine.last = nullptr;
    if (scored) member.share((int)parts_.size(), [&](int i) { score(parts_[i], kernels, args, mine); });
    member.share((int)rows_.size() * heads_.kv,
                 [&](int i) { choose(rows_[i / heads_.kv], i % heads_.kv, kernels, scored); });
}

void Selection::halve(int row, const PickArgs& args, Scratch& mine) const {
    const int padded = args.kv->padded();
    for (int h = 0; h < heads_.query; h++) {
        const size_t from = ((size_t)row * heads_.query + h) * padded;
        uint8_t* to = mine.q.data() + h * summary_bytes(*args.kv);
        if (args.kv->compute() == KV_BF16) halve_query((const uint16_t*)args.q + from, padded, args.kind, (uint16_t*)to);
        else halve_query((const uint32_t*)args.q + from, padded, args.kind, (uint32_t*)to);
    }
    mine.row = row;
}

void Selection::score(const Part& part, const Kernels& kernels, const PickArgs& args, Scratch& mine) {
    const Row& r = rows_[part.row];
    if (mine.row != r.row) halve(r.row, args, mine);
    const bool follows = mine.last && mine.last + 1 == &part && mine.last->row == part.row;
    kernels.page_scores[args.kv->compute()](
        {mine.q.data(), heads_.kv, heads_.group(), 2 * args.kv->padded(), args.summaries, r.pages + part.first,
         part.last - part.first, r.eligible - part.first, follows, scores_.data() + r.scores + part.first,
         (size_t)r.stride()});
    mine.last = &part;
}

void Selection::choose(const Row& row, int head, const Kernels& kernels, bool scored) {
    int32_t* list = lists_.data() + row.list + (size_t)head * row.listed;
    int32_t* positions = positions_.data() + row.list + (size_t)head * row.listed;
    const float* scores = scores_.data() + row.scores + (size_t)head * row.stride();
    if (scored) kernels.largest(scores, row.stride(), row.count, list);
    else for (int i = 0; i < row.count; i++) list[i] = i;
    for (int i = row.count; i < row.listed; i++) list[i] = row.eligible + i - row.count;
    for (int i = 0; i < row.listed; i++) positions[i] = list[i] * page_size_, list[i] = row.pages[list[i]];
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
