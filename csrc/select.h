// Which pages of a sequence a row reads. Of the pages that its position lets it leave out, these are the first ones, or
// those that score highest, for each KV head by itself. All later pages are always read.
#pragma once
#include <atomic>
#include <cstdint>
#include <vector>

#include "aligned.h"
#include "attention.h"
#include "kv.h"
#include "team.h"
#include "tiers.h"

namespace dovetail {

// Rows [row, row + rows) of a sequence at ascending `positions`; those before `dense_until` read everything.
struct Span {
    int row, rows;
    const int32_t* positions;
    int dense_until;
    const int32_t* pages;
    const int32_t* aliases;  // numbers under which rows that choose see the first pages; `num_aliases` of them
    int num_aliases;
};

// window: so many recent tokens are always read. budget: how many pages a row reads in all, with those of the window
// (adaptive: at most). leading: if it is not negative, it replaces the budget: so many pages are read in addition to the
// window. positions: lists say where their pages lie in the sequence, which only windows and variants need.
struct Sparsity {
    int window, budget, leading;
    bool positions, adaptive;
};

// Partial keys of a layer: tiles as in K, of `width` dimensions, [pages][KV heads][tiles of a page].
struct PartialArgs {
    const KVMemory* kv;
    const void* q;  // [rows][stride] floats, of which [query heads][width] in the compute type
    int stride;
    const uint8_t* keys;
    int width;
    float alpha;
};

struct PickArgs {
    const KVMemory* kv;
    const void* q;             // [rows][query heads][padded dim] in the compute type
    const uint8_t* summaries;  // of the layer's first page: [pages][KV heads][vectors][padded dim] in the compute
                               // type; null: the first pages are chosen
    Summary kind;
    int vectors;               // of a summary
    int64_t first_page;        // of the layer
    const Tiers* tiers;        // or null
};

class Selection {
   public:
    // False if every row reads all of its pages; then there is nothing to do.
    bool build(const std::vector<Span>& spans, const Heads& heads, int page_size, const Sparsity& sparsity);
    // The step's sequences. Rows that choose have a list of pages for each KV head. The lists lie in this object and hold
    // what `pick` last chose.
    const std::vector<Sequence>& sequences() const { return sequences_; }
    void prepare(const PickArgs& args, int threads);  // on one thread, before `pick`s like this
    void pick(Member& member, const Kernels& kernels, const PickArgs& args);
    // Chooses the pages with a token whose score is within alpha of a query's best, equally many for all KV heads.
    void prepare_partial(int threads);
    void pick_partial(Member& member, const Kernels& kernels, const PartialArgs& args);
    int64_t take_left_out() { return left_out_.exchange(0); }  // by pick_partial, of a head, in all layers
    int64_t unread() const { return unread_; }  // the fewest pages of one head that the rows leave out

   private:
    // Of its first `eligible` pages it reads `count`; its list has `listed`.
    struct Row {
        int row, eligible, count, listed;
        const int32_t* pages;
        size_t list, scores;
        const int32_t* aliases;
        int num_aliases;
        size_t logits;
        int stride() const { return (eligible + 15) / 16 * 16; }  // of a head's scores
        int32_t seen(int page) const { return page < num_aliases ? aliases[page] : pages[page]; }
    };
    struct Part {  // of a row's eligible pages
        int row, first, last;
    };
    struct Scratch {
        Aligned<uint8_t> q;  // queries of a row, as summaries take them
        int row;             // that row
        const Part* last;    // the part that was scored last
    };
    void add(const Span& span, const Sparsity& sparsity);
    void lay_out(int row, const PickArgs& args, Scratch& mine) const;
    void round(int row, const PickArgs& args, Scratch& mine) const;
    void halve(int row, const PickArgs& args, Scratch& mine) const;
    void score(const Part& part, const Kernels& kernels, const PickArgs& args, Scratch& mine);
    void score_landmarks(const Part& part, const Kernels& kernels, const PickArgs& args, Scratch& mine);
    // Calls f(page of the row) for pages that keep exact keys. They are always read.
    template <class Each> void each_apart(const Row& row, int head, const PickArgs& args, const Each& f) const;
    void rank_landmarks(const Row& row, int head, const Kernels& kernels, const PickArgs& args);
    void choose(const Row& row, int head, const Kernels& kernels, const PickArgs& args);
    void score_partial(const Part& part, const Kernels& kernels, const PartialArgs& args);
    void rank_partial(const Row& row, int head, const Kernels& kernels, const PartialArgs& args);
    void choose_partial(const Row& row, int head, const Kernels& kernels);
    void list(const Row& row, int head, int count);

    Heads heads_;
    int page_size_ = 0;
    std::vector<Row> rows_;
    std::vector<Part> parts_;
    std::vector<Sequence> sequences_;
    std::vector<int32_t> lists_, positions_;  // [row][KV head][listed]: pages, and the position of their first token
    Aligned<float> scores_;                   // [row][KV head][eligible, rounded up]
    Aligned<float> logits_;                   // of landmarks, [row][KV head][query head of its group][vector][..]
    std::vector<Scratch> scratch_;            // of each thread
    std::vector<int32_t> above_, cuts_;       // [row][KV head]: pages within alpha; [row]
    std::atomic<int64_t> left_out_{0};
    int64_t unread_ = 0;
};

// Summaries of whole pages of all layers: `out` is [layers x pages][KV heads][vectors][padded dim] in the compute type.
void summarise(Member& member, const Kernels& kernels, const KVMemory& kv, Summary kind, int layers,
               const std::vector<int64_t>& pages, uint8_t* out, int vectors);

}  // namespace dovetail
