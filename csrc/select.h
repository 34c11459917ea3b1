// Which pages of a sequence a row reads: of those that its position lets it leave out, the first ones, or the ones that
// score highest, for each KV head by itself; and all later ones.
#pragma once
#include <cstdint>
#include <vector>

#include "aligned.h"
#include "attention.h"
#include "kv.h"
#include "team.h"

namespace dovetail {

// Rows [row, row + rows) of a sequence, at positions from `start` on; those before `dense_until` read everything.
struct Span {
    int row, rows, start, dense_until;
    const int32_t* pages;
};

// `window` recent tokens are always read. Beside their pages a row reads so many as make `budget` pages with them; or,
// where `leading` is not negative, so many. `positions`: lists say where their pages lie in the sequence, which only
// variants ask for.
struct Sparsity {
    int window, budget, leading;
    bool positions;
};

struct PickArgs {
    const KVMemory* kv;
    const void* q;             // [rows][query heads][padded dim] in the compute type
    const uint8_t* summaries;  // of the layer's first page: [pages][KV heads][2][padded dim] in the compute type;
                               // null: the first pages are chosen
    Summary kind;
};

class Selection {
   public:
    // False, and nothing to do, where every row may read all of its pages.
    bool build(const std::vector<Span>& spans, const Heads& heads, int page_size, const Sparsity& sparsity);
    // The step's sequences with a list of pages per KV head for the rows that choose. They point into this, and hold
    // what `pick` last chose.
    const std::vector<Sequence>& sequences() const { return sequences_; }
    void prepare(const KVMemory& kv, int threads);  // on one thread, before `pick`s on this kind of KV
    void pick(Member& member, const Kernels& kernels, const PickArgs& args);
    int64_t unread() const { return unread_; }  // pages of one head that the rows leave out

   private:
    // Of its first `eligible` pages it reads `count`; its list has `listed`.
    struct Row {
        int row, eligible, count, listed;
        const int32_t* pages;
        size_t list, scores;
        int stride() const { return (eligible + 15) / 16 * 16; }  // of a head's scores
    };
    struct Part {  // of a row's eligible pages
        int row, first, last;
    };
    struct Scratch {
        Aligned<uint8_t> q;  // both halves of a row's queries, [query heads][2][padded dim]
        int row;             // whose they are
        const Part* last;    // scored
    };
    void add(const Span& span, const Sparsity& sparsity);
    void halve(int row, const PickArgs& args, Scratch& mine) const;
    void score(const Part& part, const Kernels& kernels, const PickArgs& args, Scratch& mine);
    void choose(const Row& row, int head, const Kernels& kernels, bool scored);

    Heads heads_;
    int page_size_ = 0;
    std::vector<Row> rows_;
    std::vector<Part> parts_;
    std::vector<Sequence> sequences_;
    std::vector<int32_t> lists_, positions_;  // [row][KV head][listed]: pages, and the position of their first token
    Aligned<float> scores_;                   // [row][KV head][eligible, rounded up]
    std::vector<Scratch> scratch_;            // of each thread
    int64_t unread_ = 0;
};

// Summaries of whole pages of all layers: `out` is [layers x pages][KV heads][2][padded dim] in the compute type.
void summarise(Member& member, const Kernels& kernels, const KVMemory& kv, Summary kind, int layers,
               const std::vector<int64_t>& pages, uint8_t* out);

}  // namespace dovetail
