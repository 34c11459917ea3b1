// KV on a device that is too small for all of it. The device has cells. For each KV head, a table says which cell holds a
// page, if one does. Complete pages are also in a slower tier and come back from there when they are wanted. Cells are
// reused by the clock algorithm: first those that were not used since its hand last passed.
//
// A page of a KV head is a blob: its K, and then its V. Heads share nothing, so each can be handled by a thread of its own.
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

// A program of several stages has layers for each stage. In addition to its pages, a layer can have as many aliases of them,
// whose K is kept as `LowRankKeys`. An alias has a page number of pages() or more.
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
    // `cells`: [heads][cells][blob]. link: the most bytes per second at which transfers from the slow tier arrive; 0 for no
    // limit.
    Tiers(const TierShape& shape, uint8_t* cells, std::unique_ptr<SlowTier> tier, double link);

    // [pages][heads]: the cell, or -1.
    const int32_t* places() const { return places_.data(); }
    const TierShape& shape() const { return shape_; }

    // Give pages [n] of every layer the aliases `names` [n]. apart: [layers and stages][heads][n], pages that keep exact K.
    void alias(const std::vector<int64_t>& names, const std::vector<int64_t>& pages, const uint8_t* apart);
    // Of the pages that got aliases together with `alias` (a number of the layer): the indices of those that keep exact K,
    // ascending.
    const std::vector<int32_t>& apart(int64_t alias, int head) const;
    void set_keys(std::shared_ptr<LowRankKeys> keys) { keys_ = std::move(keys); }

    // hold: for how many more calls of `next` the pages stay. A guess that finds no room is left out; its pages are asked
    // for again when they are needed.
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

    // Pages of earlier `want`s may be given up from now on, as their `hold` allows.
    void next(int head) { heads_[head].now++; }
    // Give these pages cells, which they keep at least until `next`. misses: pages whose new cell does not hold them yet. If
    // there is no room, `check` throws from then on, unless the wish was a guess.
    void want(int head, const int32_t* pages, int count, const Wish& wish, std::vector<Miss>& misses);
    void touch(int head, int64_t page) { heads_[head].dirty[places_[page * shape_.heads + head]] = 1; }

    // ---- of all heads, on one thread

    // Begin to fetch. If the tier can be addressed, call `copy` for each miss instead.
    void begin(const std::vector<Miss>& misses);
    void copy(const Miss& miss) const;
    // Call this for each miss, before or after it has arrived: it rebuilds K that is not stored.
    void rebuild(const Miss& miss, const Kernels& kernels) const;
    bool rebuilds() const { return keys_ != nullptr; }
    bool addressed() const { return tier_->memory() != nullptr; }
    bool waits() const { return !addressed() || link_ > 0; }
    // Wait until everything that was begun has arrived.
    void arrive();

    // Begin, copy, rebuild and wait in one call. Throws as `check` does.
    void fetch(const std::vector<Miss>& misses);

    // Bring these pages of all heads of a layer to the device. written: they are about to be written.
    void bring(int64_t layer, const std::vector<int64_t>& pages, bool written);
    // The pages are complete in every layer.
    void put(const std::vector<int64_t>& pages);
    // The pages will hold something else.
    void drop(const std::vector<int64_t>& pages);
    void copy_pages(const std::vector<int64_t>& from, const std::vector<int64_t>& to);
    // Copy what is stored of a page of a head to `out`. False if nothing is stored, or if it cannot be read.
    bool load(int64_t page, int head, uint8_t* out);
    // Begin a step: no page is held, and failed reads of the last step are forgotten.
    void step();
    // Whether the slow tier holds these pages of all layers, unchanged.
    bool stored(const std::vector<int64_t>& pages) const;
    // Throws if the step wanted something for which there was no room.
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
