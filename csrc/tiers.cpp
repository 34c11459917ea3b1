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
      stride_(stride_of(shape.blob, tier_->memory() != nullptr)), places_(shape.numbers() * shape.heads, -1), heads_(shape.heads),
      source_(shape.aliases ? shape.layer_pages : 0, 0), group_(source_.size(), 0),
      apart_(shape.aliases ? shape.pages() * shape.heads : 0, 0) {
    for (Head& h : heads_) {
        h.owner.assign(shape.cells, -1), h.until.assign(shape.cells, 0);
        h.used.assign(shape.cells, 0), h.dirty.assign(shape.cells, 0);
        h.kept.assign(shape.pages(), NOWHERE);
    }
}

// Neighbouring pages of a layer are neighbours here too, because they are often wanted together.
int64_t Tiers::offset(int64_t page, int head) const {
    const int64_t layer = page / shape_.layer_pages, inside = page % shape_.layer_pages;
    return ((layer * shape_.heads + head) * shape_.layer_pages + inside) * (int64_t)stride_;
}

int64_t Tiers::source(int64_t page) const {
    if (!is_alias(page)) return page;
    const int64_t at = page - shape_.pages();
    return at - at % shape_.layer_pages + source_[at % shape_.layer_pages];
}

// Whether its K is rebuilt instead of fetched.
bool Tiers::low_rank(const Miss& m) const {
    return is_alias(m.page) && !apart_[(m.page - shape_.pages()) * shape_.heads + m.head];
}

Transfer Tiers::transfer(const Miss& m) const {
    const size_t k = low_rank(m) ? shape_.blob / 2 : 0;
    return {offset(source(m.page), m.head) + (int64_t)k, cell(m.head, m.cell) + k, shape_.blob - k};
}

void Tiers::alias(const std::vector<int64_t>& names, const std::vector<int64_t>& pages, const uint8_t* apart) {
    const int64_t all = shape_.layers * shape_.stages, n = (int64_t)names.size();
    if (n == 0) return;
    for (int64_t name : names) groups_.erase(name);  // forget what had these names before
    std::vector<std::vector<int32_t>>& lists = groups_[names[0]];
    lists.assign((size_t)(all * shape_.heads), {});
    for (int64_t i = 0; i < all * shape_.heads; i++)
        for (int64_t p = 0; p < n; p++)
            if (apart[i * n + p]) lists[(size_t)i].push_back((int32_t)p);
    for (int64_t i = 0; i < n; i++) {
        source_.at(names[i]) = pages.at(i), group_.at(names[i]) = names[0];
        for (int64_t layer = 0; layer < all; layer++)
            for (int h = 0; h < shape_.heads; h++) {
                const int64_t at = layer * shape_.layer_pages + names[i];
                apart_[at * shape_.heads + h] = apart[(layer * shape_.heads + h) * n + i];
                forget(shape_.pages() + at, h);
            }
    }
}

const std::vector<int32_t>& Tiers::apart(int64_t alias, int head) const {
    const int64_t at = alias - shape_.pages();
    return groups_.at(group_[at % shape_.layer_pages])[(size_t)(at / shape_.layer_pages * shape_.heads + head)];
}

// Leave the page's cell without writing it back.
void Tiers::forget(int64_t page, int head) {
    int32_t& place = places_[page * shape_.heads + head];
    if (place < 0) return;
    Head& h = heads_[head];
    h.owner[place] = -1, h.dirty[place] = h.used[place] = 0;
    place = -1;
}

// ---- of one head

void Tiers::want(int head, const int32_t* pages, int count, const Wish& wish, std::vector<Miss>& misses) {
    Head& h = heads_[head];
    for (int i = 0; i < count; i++) {
        const int64_t page = pages[i] + wish.first;
        int32_t& place = places_[page * shape_.heads + head];
        if (place >= 0) {
            h.hits += h.until[place] < h.now;  // count a page once
        } else {
            const int taken = take(head);
            if (taken < 0) {
                h.full |= !wish.guess;
                continue;
            }
            place = taken;
            h.owner[place] = page;
            const Kept kept = h.kept[source(page)];
            h.misses += kept != NOWHERE;
            if (kept == STORED) misses.push_back({page, head, place});
            else if (kept == LOST || is_alias(page)) break_cell(head, place);
        }
        h.used[place] = 1;
        h.until[place] = std::max(h.until[place], h.now + (uint64_t)wish.hold);
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
    if (h.dirty[cell]) {
        const bool failed = !tier_->write_now({offset(page, head), this->cell(head, cell), shape_.blob});
        h.kept[page] = failed ? LOST : STORED;
        h.failures += failed, h.bytes_out += (int64_t)shape_.blob;
    }
    places_[page * shape_.heads + head] = -1;
    h.owner[cell] = -1, h.dirty[cell] = h.used[cell] = 0, h.evictions++;
}

// Makes the scores of this page NaN, so that a row that reads it has no result, and no other row is affected.
void Tiers::break_cell(int head, int cell) {
    uint8_t* to = this->cell(head, cell);
    memset(to, 0xff, shape_.blob / 2);
    memset(to + shape_.blob / 2, 0, shape_.blob / 2);
    heads_[head].broken.push_back(cell);
}

// ---- of all heads

void Tiers::begin(const std::vector<Miss>& misses) {
    if (misses.empty()) return;
    std::vector<Transfer> transfers;
    double bytes = 0;
    for (const Miss& m : misses) transfers.push_back(transfer(m)), bytes += (double)transfers.back().bytes;
    bytes_in_ += (int64_t)bytes;
    if (link_ > 0) {
        const auto took = std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(bytes / link_));
        link_free_ = std::max(Clock::now(), link_free_) + took;
    }
    if (!addressed()) tier_->read(transfers);
}

void Tiers::copy(const Miss& m) const {
    const Transfer t = transfer(m);
    memcpy(t.memory, tier_->memory() + t.offset, t.bytes);
}

void Tiers::rebuild(const Miss& m, const Kernels& kernels) const {
    if (!low_rank(m)) return;
    const int64_t at = m.page - shape_.pages();
    keys_->rebuild(kernels, {at / shape_.layer_pages, at % shape_.layer_pages, m.head}, cell(m.head, m.cell));
}

void Tiers::arrive() {
    const auto start = Clock::now();
    for (uint8_t* memory : tier_->wait()) {
        const size_t index = (size_t)(memory - cells_) / shape_.blob;
        const int head = (int)(index / shape_.cells), at = (int)(index % shape_.cells);
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
        want(h, list.data(), (int)list.size(), {layer * shape_.layer_pages, 0, false}, misses);
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
    for (uint8_t* memory : tier_->wait()) {  // the page stays on the device as long as there is room
        const size_t index = (size_t)(memory - cells_) / shape_.blob;
        Head& h = heads_[index / shape_.cells];
        const size_t at = index % shape_.cells;
        h.kept[h.owner[at]] = NOWHERE, h.dirty[at] = 1, h.failures++;
    }
}

bool Tiers::stored(const std::vector<int64_t>& pages) const {
    for (int64_t layer = 0; layer < shape_.layers; layer++)
        for (const Head& h : heads_)
            for (int64_t p : pages)
                if (h.kept[layer * shape_.layer_pages + p] != STORED) return false;
    return true;
}

void Tiers::drop(const std::vector<int64_t>& pages) {
    for (int64_t layer = 0; layer < shape_.layers; layer++)
        for (int64_t p : pages)
            for (int h = 0; h < shape_.heads; h++) {
                const int64_t page = layer * shape_.layer_pages + p;
                heads_[h].kept[page] = NOWHERE;
                forget(page, h);
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
        for (int c : h.broken)
            if (h.owner[c] >= 0) forget(h.owner[c], (int)(&h - heads_.data()));
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
