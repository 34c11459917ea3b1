#include "tiers.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace dovetail {

namespace {

using Clock = std::chrono::steady_clock;

size_t stride_of(size_t blob, bool addressed) { return addressed ? blob : (blob + SECTOR - 1) / SECTOR * SECTOR; }

}  // namespace

Tiers::Tiers(const TierShape& shape, uint8_t* cells, std::unique_ptr<SlowTier> tier, double link)
    : shape_(shape), cells_(cells), tier_(std::move(tier)), link_(link),
      stride_(stride_of(shape.blob, tier_->memory() != nullptr)), places_(shape.pages() * shape.heads, -1), heads_(shape.heads) {
    for (Head& h : heads_) {
        h.owner.assign(shape.cells, -1), h.until.assign(shape.cells, 0);
        h.used.assign(shape.cells, 0), h.dirty.assign(shape.cells, 0);
        h.kept.assign(shape.pages(), NOWHERE);
    }
}

// Pages that follow each other in a layer follow each other here: they are often wanted together.
int64_t Tiers::offset(int64_t page, int head) const {
    const int64_t layer = page / shape_.layer_pages, inside = page % shape_.layer_pages;
    return ((layer * shape_.heads + head) * shape_.stored_pages + inside) * (int64_t)stride_;
}

// ---- of one head

void Tiers::want(int head, const int32_t* pages, int count, int64_t first, int hold, std::vector<Miss>& misses) {
    Head& h = heads_[head];
    for (int i = 0; i < count; i++) {
        const int64_t page = pages[i] + first;
        int32_t& place = places_[page * shape_.heads + head];
        if (place >= 0) {
            h.hits += h.until[place] < h.now;  // and not a second time
        } else {
            const int taken = take(head);
            if (taken < 0) {
                h.full = true;
                continue;
            }
            place = taken;
            h.owner[place] = page;
            h.misses += h.kept[page] != NOWHERE;
            if (h.kept[page] == STORED) misses.push_back({page, head, place});
            else if (h.kept[page] == LOST) break_cell(head, place);
        }
        h.used[place] = 1;
        h.until[place] = std::max(h.until[place], h.now + (uint64_t)hold);
    }
}

int Tiers::take(int head) {
    Head& h = heads_[head];
    for (int tries = 0; tries < 3 * shape_.cells; tries++) {
        const int c = h.hand;
        h.hand = c + 1 == shape_.cells ? 0 : c + 1;
        if (h.until[c] >= h.now) continue;
        if (h.owner[c] >= 0 && h.used[c]) {
            h.used[c] = 0;
            continue;
        }
        if (h.owner[c] >= 0) evict(head, c);
        return c;
    }
    return -1;
}

void Tiers::check() const {
    if (std::any_of(heads_.begin(), heads_.end(), [](const Head& h) { return h.full; }))
        throw std::runtime_error("a step wants more KV at once than the device has room for; raise --kv-memory");
}

void Tiers::evict(int head, int cell) {
    Head& h = heads_[head];
    const int64_t page = h.owner[cell];
    if (h.dirty[cell] && stored(page)) {
        const bool failed = !tier_->write_now({offset(page, head), this->cell(head, cell), shape_.blob});
        h.kept[page] = failed ? LOST : STORED;
        h.failures += failed, h.bytes_out += (int64_t)shape_.blob;
    }
    places_[page * shape_.heads + head] = -1;
    h.owner[cell] = -1, h.dirty[cell] = h.used[cell] = 0, h.evictions++;
}

// So that a row that reads it, and no other, has no result: scores that are not a number.
void Tiers::break_cell(int head, int cell) {
    uint8_t* to = this->cell(head, cell);
    memset(to, 0xff, shape_.blob / 2);
    memset(to + shape_.blob / 2, 0, shape_.blob / 2);
    heads_[head].broken.push_back(cell);
}

// ---- of all heads

void Tiers::begin(const std::vector<Miss>& misses) {
    if (misses.empty()) return;
    const double bytes = (double)misses.size() * (double)shape_.blob;
    bytes_in_ += (int64_t)bytes;
    if (link_ > 0) {
        const auto took = std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(bytes / link_));
        link_free_ = std::max(Clock::now(), link_free_) + took;
    }
    if (addressed()) return;
    std::vector<Transfer> transfers;
    for (const Miss& m : misses) transfers.push_back({offset(m.page, m.head), cell(m.head, m.cell), shape_.blob});
    tier_->read(transfers);
}

void Tiers::copy(const Miss& m) const { memcpy(cell(m.head, m.cell), tier_->memory() + offset(m.page, m.head), shape_.blob); }

void Tiers::arrive() {
    const auto start = Clock::now();
    for (uint8_t* memory : tier_->wait()) {
        const size_t index = (size_t)(memory - cells_) / shape_.blob;
        const int head = (int)(index % shape_.heads), at = (int)(index / shape_.heads);
        heads_[head].failures++;
        break_cell(head, at);
    }
    while (Clock::now() < link_free_) pause_cpu();
    stalled_ += std::chrono::duration<double>(Clock::now() - start).count();
}

void Tiers::bring(int64_t layer, const std::vector<int64_t>& pages, bool written) {
    step();
    std::vector<Miss> misses;
    const std::vector<int32_t> list(pages.begin(), pages.end());
    for (int h = 0; h < shape_.heads; h++) {
        next(h);
        want(h, list.data(), (int)list.size(), layer * shape_.layer_pages, 0, misses);
    }
    fetch(misses);
    if (!written) return;
    for (int h = 0; h < shape_.heads; h++)
        for (int32_t p : list) touch(h, layer * shape_.layer_pages + p);
}

void Tiers::fetch(const std::vector<Miss>& misses) {
    begin(misses);
    if (addressed())
        for (const Miss& m : misses) copy(m);
    arrive();
    check();
}

void Tiers::put(const std::vector<int64_t>& pages) {
    std::vector<Transfer> transfers;
    std::vector<std::pair<int64_t, int>> which;
    for (int64_t layer = 0; layer < shape_.layers; layer++)
        for (int h = 0; h < shape_.heads; h++)
            for (int64_t p : pages) {
                const int64_t page = layer * shape_.layer_pages + p;
                const int at = places_[page * shape_.heads + h];
                if (at < 0 || !heads_[h].dirty[at]) continue;
                transfers.push_back({offset(page, h), cell(h, at), shape_.blob});
                heads_[h].bytes_out += (int64_t)shape_.blob;
                heads_[h].kept[page] = STORED, heads_[h].dirty[at] = 0;
            }
    tier_->write(transfers);
    for (uint8_t* memory : tier_->wait()) {  // it stays on the device as long as that has room
        const size_t index = (size_t)(memory - cells_) / shape_.blob;
        Head& h = heads_[index % shape_.heads];
        const size_t at = index / shape_.heads;
        h.kept[h.owner[at]] = NOWHERE, h.dirty[at] = 1, h.failures++;
    }
}

void Tiers::drop(const std::vector<int64_t>& pages) {
    for (int64_t layer = 0; layer < shape_.layers; layer++)
        for (int64_t p : pages)
            for (int h = 0; h < shape_.heads; h++) {
                const int64_t page = layer * shape_.layer_pages + p;
                int32_t& place = places_[page * shape_.heads + h];
                Head& head = heads_[h];
                head.kept[page] = NOWHERE;
                if (place < 0) continue;
                head.owner[place] = -1, head.dirty[place] = head.used[place] = 0;
                place = -1;
            }
}

void Tiers::copy_pages(const std::vector<int64_t>& from, const std::vector<int64_t>& to) {
    for (int64_t layer = 0; layer < shape_.layers; layer++)
        for (size_t i = 0; i < from.size(); i++) {
            bring(layer, {from[i], to[i]}, false);
            for (int h = 0; h < shape_.heads; h++) {
                const int64_t a = layer * shape_.layer_pages + from[i], b = layer * shape_.layer_pages + to[i];
                memcpy(cell(h, places_[b * shape_.heads + h]), cell(h, places_[a * shape_.heads + h]), shape_.blob);
                touch(h, b);
            }
        }
}

bool Tiers::load(int64_t page, int head, uint8_t* out) {
    const int at = places_[page * shape_.heads + head];
    if (at >= 0) {
        memcpy(out, cell(head, at), shape_.blob);
        return true;
    }
    if (heads_[head].kept[page] != STORED) return false;
    return tier_->read_now({offset(page, head), out, shape_.blob});
}

void Tiers::step() {
    for (Head& h : heads_) {
        const int head = (int)(&h - heads_.data());
        for (int c : h.broken) {
            if (h.owner[c] < 0) continue;
            places_[h.owner[c] * shape_.heads + head] = -1;
            h.owner[c] = -1, h.dirty[c] = h.used[c] = 0;
        }
        h.broken.clear(), h.full = false, h.now += 1 << 20;  // nothing is held any more
    }
}

TierStats Tiers::stats() const {
    TierStats s{0, 0, 0, bytes_in_, 0, 0, stalled_};
    for (const Head& h : heads_)
        s.hits += h.hits, s.misses += h.misses, s.evictions += h.evictions, s.bytes_out += h.bytes_out, s.failures += h.failures;
    return s;
}

}  // namespace dovetail
