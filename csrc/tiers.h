// KV on a device that is too small for all of it. Pages have numbers of their own; for each KV head by itself, a table
// says in which cell of the device a page lies, if it does. What is complete is also in a slower tier, from where it
// comes back when it is wanted. Cells are given up to the clock algorithm: those not used since the hand last passed.
//
// A page of a KV head is a blob: its K, and then its V. Heads share nothing, so a thread can see to one of them.
#pragma once
#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "low_rank.h"
#include "slow_tier.h"
#include "team.h"

namespace dovetail {

// Programs of several stages have layers again for each of them. Beside its pages, a layer can have as many aliases of
// them, whose K is kept as `LowRankKeys`: page + pages() + a number of its own.
struct TierShape {
    int heads, cells;  // cells: of each head
    int64_t layers, stages, layer_pages;
    bool aliases;
    size_t blob;
    int64_t pages() const { return layers * stages * layer_pages; }
    int64_t numbers() const { return aliases ? 2 * pages() : pages(); }
};

struct TierStats {
    int64_t hits, misses, evictions, bytes_in, bytes_out, failures;
    double stall_seconds;
};

class Tiers {
 public:
    // `cells`: [heads][cells][blob]. link: bytes per second at which transfers from the slow tier arrive at most; 0 for as
    // they come.
    Tiers(const TierShape& shape, uint8_t* cells, std::unique_ptr<SlowTier> tier, double link);

    // [pages][heads]: the cell, or -1.
    const int32_t* places() const { return places_.data(); }
    const TierShape& shape() const { return shape_; }

    // Aliases [n] of pages [n] of every layer. apart: [layers and stages][heads][n], those that keep their K as it is.
    void alias(const std::vector<int64_t>& names, const std::vector<int64_t>& pages, const uint8_t* apart);
    // Of the pages that were given aliases together with `alias` (a number of the layer), those that keep their K: which of
    // them they are, ascending.
    const std::vector<int32_t>& apart(int64_t alias, int head) const;
    void set_keys(std::shared_ptr<LowRankKeys> keys) { keys_ = std::move(keys); }

    // For how many more of `next` pages stay. A guess that finds no room is left out: it is asked for when it is needed.
    struct Wish {
        int64_t first;  // added to page numbers
        int hold;
        bool guess;
    };
    // A page that has to be brought into a cell.
    struct Miss {
        int64_t page;
        int head, cell;
    };

    // ---- of one head, on one thread

    // What earlier wants have brought may go.
    void next(int head) { heads_[head].now++; }
    // Cells for these pages, which stay until `next` at least. `misses`: those that now lie in a cell which does not hold
    // them yet. Where there is no room, `check` throws from then on, unless it was a guess.
    void want(int head, const int32_t* pages, int count, const Wish& wish, std::vector<Miss>& misses);
    void touch(int head, int64_t page) { heads_[head].dirty[places_[page * shape_.heads + head]] = 1; }

    // ---- of all heads, on one thread

    // Begin to fetch. Where the tier can be addressed, `copy` is to be called for each miss instead.
    void begin(const std::vector<Miss>& misses);
    void copy(const Miss& miss) const;
    // To be called for each miss, before or after it has arrived: makes K that is not kept.
    void rebuild(const Miss& miss, const Kernels& kernels) const;
    bool rebuilds() const { return keys_ != nullptr; }
    bool addressed() const { return tier_->memory() != nullptr; }
    bool waits() const { return !addressed() || link_ > 0; }
    // All that was begun has arrived.
    void arrive();

    // All of that at once. Throws as `check` does.
    void fetch(const std::vector<Miss>& misses);

    // Bring these pages of all heads of a layer; `written`: they are about to be written.
    void bring(int64_t layer, const std::vector<int64_t>& pages, bool written);
    // The pages, of every layer, are complete.
    void put(const std::vector<int64_t>& pages);
    // They will hold something else.
    void drop(const std::vector<int64_t>& pages);
    void copy_pages(const std::vector<int64_t>& from, const std::vector<int64_t>& to);
    // Copy what is stored of a page of a head. False: nothing, or it cannot be read.
    bool load(int64_t page, int head, uint8_t* out);
    // Begin a step: nothing is held, and what could not be read in the last one is forgotten.
    void step();
    // Whether the slow tier holds these pages of all layers, as they are.
    bool stored(const std::vector<int64_t>& pages) const;
    // Throws if there was no room for something that was wanted in the step.
    void check() const;

    TierStats stats() const;
    int descriptor() const { return tier_->descriptor(); }
    uint8_t* cell(int head, int cell) const { return cells_ + ((size_t)head * shape_.cells + cell) * shape_.blob; }

 private:
    enum Kept : uint8_t { NOWHERE, STORED, LOST };
    struct Head {
        std::vector<int64_t> owner;   // of each cell: page, or -1
        std::vector<uint64_t> until;  // of each cell: it must not be taken before `now` is beyond
        std::vector<uint8_t> used, dirty;
        std::vector<Kept> kept;       // of each page
        uint64_t now = 1;
        int hand = 0;
        bool full = false;
        std::vector<int> broken;  // cells that could not be read in this step
        int64_t hits = 0, misses = 0, evictions = 0, bytes_out = 0, failures = 0;
    };

    int take(int head);
    void evict(int head, int cell);
    int64_t offset(int64_t page, int head) const;
    bool is_alias(int64_t page) const { return page >= shape_.pages(); }
    // The page for which an alias stands.
    int64_t source(int64_t page) const;
    bool low_rank(const Miss& m) const;
    Transfer transfer(const Miss& m) const;
    void forget(int64_t page, int head);
    void break_cell(int head, int cell);

    const TierShape shape_;
    uint8_t* cells_;
    std::unique_ptr<SlowTier> tier_;
    const double link_;
    const size_t stride_;  // of blobs in the slow tier
    std::vector<int32_t> places_;
    std::vector<Head> heads_;
    std::vector<int64_t> source_, group_;  // of each alias: the page, and the first of those that came with it
    std::vector<uint8_t> apart_;           // [layers and stages][aliases][heads]
    std::unordered_map<int64_t, std::vector<std::vector<int32_t>>> groups_;  // [layers and stages][heads]: those apart
    std::shared_ptr<LowRankKeys> keys_;
    std::chrono::steady_clock::time_point link_free_{};
    int64_t bytes_in_ = 0;
    double stalled_ = 0;
};

}  // namespace dovetail
