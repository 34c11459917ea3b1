// Attention over paged KV: a plan once per step on one thread, a run per layer on all.
//
// Keys are cut into chunks of CHUNK tokens, counted from the start of each list. A chunk gives a partial state for each
// query row. States are merged in the order of the chunks. So it never changes a result which thread computes a chunk, or
// that a chunk is read once for several sequences that share its pages (a cascade).
#pragma once
#include <cstdint>
#include <vector>

#include "aligned.h"
#include "kv.h"
#include "team.h"

namespace dovetail {

constexpr int CHUNK = KEYS;  // tokens

// Rows [row, row + rows) of the batch. The first is at position `start`. Row i is at `positions[i]`, which ascend, or
// without positions at `start + i`. Rows read the keys before `length`, whose pages are listed in `pages`. If `lists` is not
// 1, each KV head reads its own list of `num_pages` pages.
struct Sequence {
    int row, rows, start, length;
    const int32_t* pages;
    int num_pages, lists;
    const int32_t* page_positions;  // if lists leave pages out: the position of each listed page's first token
    const int32_t* cut = nullptr;   // or null: by how many tokens the lists turned out to be shorter
    const int32_t* positions = nullptr;
    int real_length() const { return cut ? length - *cut : length; }
    int position(int i) const { return positions ? positions[i] : start + i; }
};

struct Heads {
    int query, kv, dim;
    int group() const { return query / kv; }
};

// The arguments of one layer.
struct AttendArgs {
    const KVMemory* kv;
    int64_t first_page;  // of the layer
    const void* q;       // [rows][query heads][padded dim] in the compute type, already scaled
    float* out;          // [rows][out_stride]
    int out_stride;
    int window;          // only the last `window` keys; 0 for all
    Variant variant;     // or null
    const float* params;
    float* lse;          // [rows][query heads] log-sum-exp of the scores, or null
};

struct PlanStats {
    int64_t items, merged_rows, tokens_read, tokens_without_sharing, shared_rows;
};

class AttentionPlan {
   public:
    // cascade: read pages that several sequences share once. split: cut long sequences over threads.
    void build(const std::vector<Sequence>& sequences, const Heads& heads, int page_size, int threads, bool cascade,
               bool split);
    void prepare(const KVMemory& kv);  // on one thread, before `run`s on this kind of KV
    void run(Member& member, const Kernels& kernels, const AttendArgs& args);
    const PlanStats& stats() const { return stats_; }

   private:
    // Sequences that read the same chunks [first, last), with all their rows.
    struct Node {
        int sequence;  // whose pages to read
        int row_list, rows;
        int first, last;
        int parts;     // ranges of chunks that are computed separately
        bool whole;    // the only node of its rows, in one part
    };
    struct Item {
        int node, head, row, rows, first, last, piece;
        float cost;
    };
    struct Merge {
        int row, state, pieces;
    };
    // A register block of packed rows: row p is query head p % group of the item's row p / group.
    struct Rows {
        const Item& item;
        int first, count;
    };

    void add_sequence(int s, int first);
    void group(std::vector<int>& members, int first);
    bool same_chunk(int a, int b, int chunk) const;
    bool past(int s, int chunk) const;
    bool plain(int s) const;
    void add_node(const int* members, int count, int first, int last);
    void cut();
    void deal();
    // Memory of one thread.
    struct Scratch {
        Aligned<float> states;
        Aligned<uint8_t> q, k, v;
        KeyBlock keys;
    };
    void run_item(int index, const Kernels& kernels, const AttendArgs& args, Scratch& mine);
    // Which chunk to load, and for which of its keys.
    struct Wanted {
        int chunk, first, last;
        bool follows;  // the chunk before was loaded, and this one was fetched then
        bool many;     // more rows than a register block
    };
    void load_chunk(int index, const Kernels& kernels, const AttendArgs& args, const Wanted& what, Scratch& mine) const;
    void use_codes(const Kernels& kernels, const KVMemory& kv, const Wanted& what, Scratch& mine) const;
    void gather(const struct Reader& reader, int chunk, Scratch& mine) const;
    void keep_piece(const Item& item, int piece, Scratch& mine);
    void run_rows(const Rows& rows, const Kernels& kernels, const AttendArgs& args, int chunk, Scratch& mine);
    void key_positions(const Sequence& s, int head, int first, int32_t* out) const;
    void finish(float* state, int row, int query_head, const Kernels& kernels, const AttendArgs& args) const;
    void run_merge(const Merge& merge, int head, const Kernels& kernels, const AttendArgs& args, Scratch& mine);
    int record() const { return padded_ + 16; }
    float* state(int row_state, int piece, int query_head) {
        return states_.data() + ((size_t)(row_state + piece) * heads_.query + query_head) * record();
    }

    std::vector<Sequence> sequences_;
    Heads heads_;
    int page_size_, threads_, padded_;
    std::vector<Node> nodes_;
    std::vector<int> row_lists_, row_position_, row_state_, row_pieces_;
    std::vector<Item> items_;
    std::vector<Merge> merges_;
    Aligned<float> states_;
    std::vector<Scratch> scratch_;  // of each thread
    int packed_rows_ = 1;           // of an item, at most
    PlanStats stats_;
};

}  // namespace dovetail
