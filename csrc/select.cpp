#include "select.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "small_floats.h"

namespace dovetail {

namespace {

constexpr int PART = 64;  // pages that one piece of work scores
constexpr float DEVIATIONS = 4;  // standard deviations, for independent dimensions: |q| . std is at most sqrt(dim) of one

size_t summary_bytes(const KVMemory& kv) { return (size_t)2 * kv.padded() * kv.element(); }

// How many values a landmark has in the layout of bfloat16 products.
int landmark_width(const KVMemory& kv) { return (kv.dim + 31) / 32 * 32; }

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
        r.list = lists, r.scores = r.logits = scores;
        lists += (size_t)r.listed * heads.kv, scores += (size_t)r.stride() * heads.kv;
        unread_ += r.eligible - r.count;
        for (int p = 0; p < r.eligible; p += PART)
            parts_.push_back({(int)(&r - rows_.data()), p, std::min(p + PART, r.eligible)});
    }
    lists_.resize(lists), positions_.resize(lists), scores_.resize(scores);
    for (const Row& r : rows_)  // values beyond a head's scores must never be among the largest
        for (int h = 1; h <= heads.kv; h++)
            for (int p = r.eligible - r.stride(); p < 0; p++) scores_[r.scores + h * r.stride() + p] = -INFINITY;
    size_t next = 0;
    above_.assign(rows_.size() * heads.kv, 0), cuts_.assign(rows_.size(), 0), left_out_ = 0;
    const bool positions = sparsity.positions || heads.kv == 1;  // which also keep a single list from being shared
    for (Sequence& s : sequences_) {
        if (s.pages) continue;
        s.cut = &cuts_[next];
        const size_t list = rows_[next++].list;
        s.pages = lists_.data() + list;
        if (positions) s.page_positions = positions_.data() + list;
    }
    return true;
}

// Adds the rows of a span that read everything as one sequence, and each other row as a sequence of its own.
void Selection::add(const Span& span, const Sparsity& sparsity) {
    int dense = 0;
    for (int i = 0; i < span.rows; i++) {
        const int position = span.positions[i], pages = position / page_size_ + 1;
        const int may = position < span.dense_until ? 0 : std::max(0, position + 1 - sparsity.window) / page_size_;
        int count = sparsity.leading >= 0 ? sparsity.leading : std::max(0, sparsity.budget - (pages - may));
        if (sparsity.adaptive) count = std::min(count, may);
        if (count >= may && !(sparsity.adaptive && may > 0)) {
            dense = i + 1;  // once a row chooses, all later rows do, because they may leave out more
            continue;
        }
        const int listed = count + pages - may;
        rows_.push_back({span.row + i, may, count, listed, span.pages, 0, 0, span.aliases, span.num_aliases, 0});
        const int length = (listed - 1) * page_size_ + position % page_size_ + 1;
        sequences_.push_back({span.row + i, 1, position, length, nullptr, listed, heads_.kv, nullptr});
    }
    if (dense) {
        const int length = span.positions[dense - 1] + 1;
        sequences_.push_back({span.row, dense, span.positions[0], length, span.pages,
                              (length + page_size_ - 1) / page_size_, 1, nullptr, nullptr, span.positions});
    }
}

void Selection::prepare(const PickArgs& args, int threads) {
    const KVMemory& kv = *args.kv;
    const bool landmarks = args.kind == LANDMARKS;
    const size_t each = landmarks          ? (size_t)landmark_width(kv) * kv.element()
                        : args.kind == CODES ? code_query(kv.padded(), kv.element())
                                             : summary_bytes(kv);
    scratch_.resize(threads);
    for (Scratch& s : scratch_)
        if (s.q.size() < heads_.query * each) s.q.resize(heads_.query * each);
    const size_t need = landmarks ? scores_.size() * heads_.group() * args.vectors : 0;
    if (logits_.size() < need) logits_.resize(need);
}

void Selection::pick(Member& member, const Kernels& kernels, const PickArgs& args) {
    Scratch& mine = scratch_[member.id];
    const bool scored = args.summaries != nullptr;
    mine.row = -1, mine.last = nullptr;
    if (scored) member.share((int)parts_.size(), [&](int i) { score(parts_[i], kernels, args, mine); });
    member.share((int)rows_.size() * heads_.kv,
                 [&](int i) { choose(rows_[i / heads_.kv], i % heads_.kv, kernels, args); });
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
    if (args.kind == LANDMARKS) return score_landmarks(part, kernels, args, mine);
    const Row& r = rows_[part.row];
    const bool codes = args.kind == CODES;
    if (mine.row != r.row) codes ? round(r.row, args, mine) : halve(r.row, args, mine);
    const int n = args.kv->padded(), chunks = codes ? (page_size_ + 15) / 16 : args.vectors / 2;
    const bool follows = mine.last && mine.last + 1 == &part && mine.last->row == part.row;
    kernels.page_scores[args.kind][args.kv->compute()](
        {mine.q.data(), heads_.kv, heads_.group(), codes ? n : 2 * n, chunks, args.summaries, r.pages + part.first,
         part.last - part.first, r.eligible - part.first, follows, scores_.data() + r.scores + part.first,
         (size_t)r.stride()});
    mine.last = &part;
}

// The queries [query heads] as codes take them: see PageScores.
void Selection::round(int row, const PickArgs& args, Scratch& mine) const {
    const int n = args.kv->padded(), element = args.kv->element();
    const size_t bytes = code_query(n, element), values = (size_t)n * element;
    float q[MAX_DIM];
    for (int h = 0; h < heads_.query; h++) {
        const uint8_t* from = (const uint8_t*)args.q + ((size_t)row * heads_.query + h) * values;
        uint8_t* to = mine.q.data() + h * bytes;
        float most = 0;
        for (int i = 0; i < n; i++) {
            q[i] = element == 4 ? ((const float*)from)[i] : bf16_value(((const uint16_t*)from)[i]);
            most = std::max(most, std::fabs(q[i]));
        }
        memcpy(to, from, values), memset(to + values, 0, bytes - values);
        const float by = most > 0 ? CODE_SCALE / most : 0.0f, unit = most * (32768.0f / (255.0f * CODE_SCALE));
        for (int i = 0; i < n; i++) {  // NaN stays visible in the values
            const float x = q[i] * by;
            ((int16_t*)(to + values))[i] = x == x ? (int16_t)std::nearbyint(x) : 0;
        }
        memcpy(to + bytes - CODE_UNIT, &unit, 4);
    }
    mine.row = row;
}

// The queries [query heads], each as wide as a landmark.
void Selection::lay_out(int row, const PickArgs& args, Scratch& mine) const {
    const KVMemory& kv = *args.kv;
    const size_t from = (size_t)kv.padded() * kv.element(), to = (size_t)landmark_width(kv) * kv.element();
    for (int h = 0; h < heads_.query; h++) {
        uint8_t* at = mine.q.data() + h * to;
        memcpy(at, (const uint8_t*)args.q + ((size_t)row * heads_.query + h) * from, from);
        memset(at + from, 0, to - from);
    }
    mine.row = row;
}

void Selection::score_landmarks(const Part& part, const Kernels& kernels, const PickArgs& args, Scratch& mine) {
    const Row& r = rows_[part.row];
    if (mine.row != r.row) lay_out(r.row, args, mine);
    const size_t stride = r.stride();
    kernels.landmark_logits[args.kv->compute()](
        {mine.q.data(), heads_.kv, heads_.group(), landmark_width(*args.kv), args.vectors, args.summaries,
         r.pages + part.first, part.last - part.first,
         logits_.data() + r.logits * heads_.group() * args.vectors + part.first, stride});
}

// Scores from the logits of landmarks. Pages that keep exact keys do not compete.
void Selection::rank_landmarks(const Row& row, int head, const Kernels& kernels, const PickArgs& args) {
    const int stride = row.stride(), runs = heads_.group() * args.vectors;
    float* logits = logits_.data() + (row.logits + (size_t)head * stride) * runs;
    float* scores = scores_.data() + row.scores + (size_t)head * stride;
    for (int i = 0; i < runs; i++) std::fill(logits + i * stride + row.eligible, logits + (i + 1) * stride, -INFINITY);
    each_apart(row, head, args, [&](int p) {
        for (int i = 0; i < runs; i++) logits[i * stride + p] = -INFINITY;
    });
    kernels.softmax_scores({logits, heads_.group(), args.vectors, stride, stride, scores});
}

template <class Each> void Selection::each_apart(const Row& row, int head, const PickArgs& args, const Each& f) const {
    if (!args.tiers || !row.num_aliases) return;
    for (int32_t p : args.tiers->apart(row.aliases[0] + args.first_page, head))
        if (p < row.eligible) f(p);
}

void Selection::choose(const Row& row, int head, const Kernels& kernels, const PickArgs& args) {
    const bool scored = args.summaries != nullptr;
    if (scored && args.kind == LANDMARKS) rank_landmarks(row, head, kernels, args);
    int32_t* list = lists_.data() + row.list + (size_t)head * row.listed;
    float* scores = scores_.data() + row.scores + (size_t)head * row.stride();
    each_apart(row, head, args, [&](int p) { scores[p] = INFINITY; });
    if (scored) kernels.largest(scores, row.stride(), row.count, list);
    else for (int i = 0; i < row.count; i++) list[i] = i;
    this->list(row, head, row.count);
}

// Completes a list of `count` chosen pages, which are given by their numbers in the sequence.
void Selection::list(const Row& row, int head, int count) {
    int32_t* list = lists_.data() + row.list + (size_t)head * row.listed;
    int32_t* positions = positions_.data() + row.list + (size_t)head * row.listed;
    const int all = row.listed - row.count + count;
    for (int i = count; i < row.listed; i++) list[i] = row.eligible + std::min(i, all - 1) - count;
    for (int i = 0; i < row.listed; i++) positions[i] = list[i] * page_size_;
    for (int i = 0; i < count; i++) list[i] = row.seen(list[i]);
    for (int i = count; i < row.listed; i++) list[i] = row.pages[list[i]];  // pages that every row reads are exact
}

// ---- by partial keys

void Selection::prepare_partial(int threads) {
    scratch_.resize(threads);
    const size_t need = scores_.size() * heads_.group();
    if (logits_.size() < need) logits_.resize(need);
}

void Selection::pick_partial(Member& member, const Kernels& kernels, const PartialArgs& args) {
    const int pieces = (int)rows_.size() * heads_.kv;
    member.share((int)parts_.size(), [&](int i) { score_partial(parts_[i], kernels, args); });
    member.share(pieces, [&](int i) { rank_partial(rows_[i / heads_.kv], i % heads_.kv, kernels, args); });
    member.share(pieces, [&](int i) { choose_partial(rows_[i / heads_.kv], i % heads_.kv, kernels); });
}

// The best score of each page's tokens, for each query head by itself.
void Selection::score_partial(const Part& part, const Kernels& kernels, const PartialArgs& args) {
    const Row& r = rows_[part.row];
    const KVMemory& kv = *args.kv;
    const int group = heads_.group(), per_page = page_size_ / 16;
    const size_t tile = (size_t)16 * args.width * kv.element(), q_head = (size_t)args.width * kv.element();
    alignas(64) float scores[MAX_QUERIES * KEYS];
    for (int h = 0; h < heads_.kv; h++)
        for (int first = part.first * per_page; first < part.last * per_page; first += KEY_TILES) {
            KeyBlock keys;
            keys.first = 0, keys.last = KEY_TILES;
            const int last = part.last * per_page;
            for (int i = 0; i < KEY_TILES; i++) {
                const int at = std::min(first + i, last - 1), next = std::min(first + KEY_TILES + i, last - 1);
                auto of = [&](int t) {
                    return args.keys + (((size_t)r.pages[t / per_page] * heads_.kv + h) * per_page + t % per_page) * tile;
                };
                keys.k[i] = of(at), keys.next_k[i] = of(next);
            }
            const int count = std::min(KEY_TILES, last - first);
            for (int g = 0; g < group; g += MAX_QUERIES) {
                const int some = std::min(MAX_QUERIES, group - g);
                const uint8_t* q = (const uint8_t*)((const float*)args.q + (size_t)r.row * args.stride) + (h * group + g) * q_head;
                kernels.scores[kv.compute()](q, args.width, some, args.width, keys, scores);
                for (int i = 0; i < some; i++) {
                    float tiles[KEY_TILES];
                    float* best = logits_.data() + ((r.scores + (size_t)h * r.stride()) * group) + (size_t)(g + i) * r.stride();
                    kernels.best_of_sixteen(scores + i * KEYS, count, tiles);
                    for (int t = 0; t < count; t++) {
                        float& to = best[(first + t) / per_page];
                        to = (first + t) % per_page ? std::max(to, tiles[t]) : tiles[t];
                    }
                }
            }
        }
}

void Selection::rank_partial(const Row& row, int head, const Kernels& kernels, const PartialArgs& args) {
    const int stride = row.stride(), group = heads_.group();
    float* best = logits_.data() + (row.scores + (size_t)head * stride) * group;
    for (int g = 0; g < group; g++) std::fill(best + g * stride + row.eligible, best + (g + 1) * stride, -INFINITY);
    float* out = scores_.data() + row.scores + (size_t)head * stride;
    // Values beyond the eligible pages are -infinity, which is above only the -infinity of an unlimited alpha.
    above_[(&row - rows_.data()) * heads_.kv + head] =
        std::min(row.eligible, kernels.margins(best, group, stride, args.alpha, out));
}

void Selection::choose_partial(const Row& row, int head, const Kernels& kernels) {
    const size_t r = &row - rows_.data();
    int above = 0;
    for (int h = 0; h < heads_.kv; h++) above += above_[r * heads_.kv + h];
    const int count = std::min(row.count, std::max(1, (above + heads_.kv - 1) / heads_.kv));
    int32_t* list = lists_.data() + row.list + (size_t)head * row.listed;
    kernels.largest(scores_.data() + row.scores + (size_t)head * row.stride(), row.stride(), count, list);
    this->list(row, head, count);
    if (head == 0) cuts_[r] = (row.count - count) * page_size_, left_out_ += row.eligible - count;
}

void summarise(Member& member, const Kernels& kernels, const KVMemory& kv, Summary kind, int layers,
               const std::vector<int64_t>& pages, uint8_t* out, int vectors) {
    const int n = (int)pages.size(), width = landmark_width(kv);
    const size_t bytes = (size_t)vectors * (kind == LANDMARKS ? width : kv.padded()) * kv.element();
    member.share(n * layers, [&](int i) {
        const int64_t page = pages[i % n] + (i / n) * kv.pages_per_layer;
        thread_local std::vector<uint8_t> room;
        for (int h = 0; h < kv.heads; h++) {
            const PageTiles tiles{page_keys(kernels, kv, page, h, room), kv.tile_bytes(), kv.page_size / 16, kv.padded(),
                                  DEVIATIONS / std::sqrt((float)kv.dim)};
            uint8_t* to = out + ((size_t)page * kv.heads + h) * bytes;
            if (kind == LANDMARKS) kernels.landmarks[kv.compute()](tiles, vectors, width, to);
            else kernels.summarise[kind][kv.compute()](tiles, vectors / 2, to);
        }
    });
}

}  // namespace dovetail
