#include "attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace dovetail {

namespace {

constexpr double READ = 14, ROW = 1;  // relative cost of a key: to fetch it, and for each query row and head
constexpr int ITEM_ROWS = 32;         // the most rows of an item
constexpr int LEAST_ROWS = 6;         // packed rows of an item: a register block
constexpr int PIECES = 8;             // items per thread to aim at

int chunks_of(int tokens) { return (tokens + CHUNK - 1) / CHUNK; }

}  // namespace

// ---- planning

// Whether all keys of the chunk lie before the sequence's first row, so that no mask can differ between rows.
bool AttentionPlan::past(int s, int chunk) const {
    return (chunk + 1) * CHUNK <= std::min(sequences_[s].start, sequences_[s].length);
}

// Whether it reads one list of pages from position 0 on.
bool AttentionPlan::plain(int s) const { return sequences_[s].lists == 1 && !sequences_[s].page_positions; }

bool AttentionPlan::same_chunk(int a, int b, int chunk) const {
    const int first = chunk * CHUNK / page_size_, last = ((chunk + 1) * CHUNK - 1) / page_size_;
    const int32_t *p = sequences_[a].pages, *q = sequences_[b].pages;
    for (int i = first; i <= last; i++)
        if (p[i] != q[i]) return false;
    return true;
}

void AttentionPlan::add_node(const int* members, int count, int first, int last) {
    Node n{members[0], (int)row_lists_.size(), 0, first, last, 1, false};
    for (int i = 0; i < count; i++) {
        const Sequence& s = sequences_[members[i]];
        for (int r = 0; r < s.rows; r++) row_lists_.push_back(s.row + r);
        n.rows += s.rows;
    }
    nodes_.push_back(n);
    stats_.tokens_read += std::min(last * CHUNK, sequences_[members[0]].length) - first * CHUNK;
    if (count > 1) stats_.shared_rows += n.rows;
}

void AttentionPlan::add_sequence(int s, int first) {
    add_node(&s, 1, first, chunks_of(sequences_[s].length));
}

// A trie of chunks: members share everything before `first`.
void AttentionPlan::group(std::vector<int>& members, int first) {
    std::vector<int> rest;
    while (!members.empty()) {
        const int lead = members[0];
        std::vector<int> same{lead};
        rest.clear();
        const bool shareable = past(lead, first) && plain(lead);
        for (size_t i = 1; i < members.size(); i++) {
            const int m = members[i];
            const bool joins = shareable && past(m, first) && plain(m) && same_chunk(lead, m, first);
            (joins ? same : rest).push_back(m);
        }
        if (same.size() == 1) {
            add_sequence(lead, first);
        } else {
            int last = first + 1;
            auto goes_on = [&](int m) { return past(m, last) && same_chunk(lead, m, last); };
            while (std::all_of(same.begin(), same.end(), goes_on)) last++;
            add_node(same.data(), (int)same.size(), first, last);
            group(same, last);
        }
        members.swap(rest);
    }
}

void AttentionPlan::build(const std::vector<Sequence>& sequences, const Heads& heads, int page_size, int threads,
                          bool cascade, bool split) {
    sequences_.clear();
    for (const Sequence& s : sequences)
        if (s.rows > 0) sequences_.push_back(s);
    heads_ = heads, page_size_ = page_size, threads_ = split ? threads : 1;
    padded_ = (heads.dim + 15) / 16 * 16;
    scratch_.resize(threads);
    packed_rows_ = 1;
    nodes_.clear(), row_lists_.clear(), items_.clear(), merges_.clear();
    stats_ = {};
    int rows = 0;
    for (const Sequence& s : sequences_) {
        rows = std::max(rows, s.row + s.rows);
        stats_.tokens_without_sharing += s.length;
    }
    row_position_.assign(rows, 0);
    for (const Sequence& s : sequences_)
        for (int r = 0; r < s.rows; r++) row_position_[s.row + r] = s.position(r);
    std::vector<int> members;
    for (int i = 0; i < (int)sequences_.size(); i++) {
        if (cascade) members.push_back(i);
        else add_sequence(i, 0);
    }
    if (cascade) group(members, 0);
    row_pieces_.assign(rows, 0), row_state_.assign(rows, -1);
    cut();
    std::stable_sort(items_.begin(), items_.end(), [](const Item& a, const Item& b) { return a.cost > b.cost; });
    deal();
    int states = 0;
    for (int r = 0; r < rows; r++) {
        if (row_pieces_[r] == 0) continue;
        row_state_[r] = states;
        merges_.push_back({r, states, row_pieces_[r]});
        states += row_pieces_[r];
    }
    const size_t need = (size_t)states * heads.query * record();
    if (states_.size() < need) states_.resize(need);
    stats_.items = (int64_t)items_.size(), stats_.merged_rows = (int64_t)merges_.size();
}

// Put items in the order in which threads own them: the longest first to the least loaded.
void AttentionPlan::deal() {
    const int n = (int)items_.size(), t = threads_;
    if (t == 1 || n <= 1) return;
    std::vector<int> room(t), at(t);
    std::vector<double> load(t, 0);
    for (int i = 0; i < t; i++) at[i] = (int)((int64_t)n * i / t), room[i] = (int)((int64_t)n * (i + 1) / t) - at[i];
    std::vector<Item> dealt(n);
    for (const Item& item : items_) {
        int best = -1;
        for (int i = 0; i < t; i++)
            if (room[i] && (best < 0 || load[i] < load[best])) best = i;
        dealt[at[best]++] = item, room[best]--, load[best] += item.cost;
    }
    items_.swap(dealt);
}

void AttentionPlan::cut() {
    double total = 0;
    auto cost = [&](int tokens, int rows) { return tokens * (READ + ROW * rows * heads_.group()); };
    auto until = [&](const Node& n, int row) {  // chunks that a row of the node can read
        const Sequence& s = sequences_[n.sequence];
        return s.page_positions ? n.last : std::min(n.last, row_position_[row_lists_[n.row_list + row]] / CHUNK + 1);
    };
    for (const Node& n : nodes_) total += cost((n.last - n.first) * CHUNK, n.rows) * heads_.kv;
    const double target = threads_ == 1 ? 1e30 : std::max(total / (threads_ * PIECES), cost(CHUNK, 1));
    for (int i = 0; i < (int)nodes_.size(); i++) {
        Node& n = nodes_[i];
        const int chunks = n.last - n.first;
        // Rows are cut before chunks, because that needs no states. At least a register block of rows stays together.
        const int wanted = std::max(1, (int)std::ceil(cost(chunks * CHUNK, n.rows) / target));
        const int together = (LEAST_ROWS + heads_.group() - 1) / heads_.group();
        const int each = std::clamp((n.rows + wanted - 1) / wanted, std::min(together, ITEM_ROWS), ITEM_ROWS);
        const int row_parts = (n.rows + each - 1) / each;
        n.parts = std::clamp((wanted + row_parts - 1) / row_parts, 1, std::max(1, chunks));
        const bool from_start = n.first == 0, to_end = n.last == chunks_of(sequences_[n.sequence].length);
        n.whole = from_start && to_end && n.parts == 1;
        int piece = row_pieces_[row_lists_[n.row_list]];  // its rows share all earlier nodes
        for (int p = 0; p < n.parts; p++) {
            const int first = n.first + chunks * p / n.parts, last = n.first + chunks * (p + 1) / n.parts;
            for (int h = 0; h < heads_.kv; h++)
                for (int r = 0; r < n.rows; r += each) {
                    const int some = std::min(each, n.rows - r);
                    packed_rows_ = std::max(packed_rows_, some * heads_.group());
                    const int read = std::max(0, std::min(last, until(n, r + some - 1)) - first);
                    items_.push_back({i, h, r, some, first, last, piece, (float)cost(read * CHUNK, some)});
                }
            piece += first == 0 ? 1 : last - first;
        }
        if (!n.whole)
            for (int r = 0; r < n.rows; r++) row_pieces_[row_lists_[n.row_list + r]] = piece;
    }
}

// ---- running

void AttentionPlan::prepare(const KVMemory& kv) {
    const size_t gathered = kv.layout == TILED && !kv.coded() ? 0 : (size_t)KEYS * padded_ * kv.element();
    for (Scratch& s : scratch_) {
        if (s.states.size() < (size_t)packed_rows_ * record()) s.states.resize((size_t)packed_rows_ * record());
        if (s.q.size() < (size_t)packed_rows_ * padded_ * 4) s.q.resize((size_t)packed_rows_ * padded_ * 4);
        if (s.k.size() < gathered) s.k.resize(gathered), s.v.resize(gathered);
    }
}

void AttentionPlan::run(Member& member, const Kernels& kernels, const AttendArgs& args) {
    Scratch& mine = scratch_[member.id];
    member.share((int)items_.size(), [&](int i) { run_item(i, kernels, args, mine); });
    if (merges_.empty()) return;
    member.share((int)merges_.size() * heads_.kv,
                 [&](int i) { run_merge(merges_[i / heads_.kv], i % heads_.kv, kernels, args, mine); });
}

struct Reader {
    const Sequence& s;
    const KVMemory& kv;
    int64_t first_page;
    int head;

    // Page i of the list. Beyond the list's end it is the last page, which will not count.
    int64_t page(int i) const {
        const int32_t* list = s.pages + (s.lists == 1 ? 0 : (size_t)head * s.num_pages);
        return first_page + list[std::min(i, s.num_pages - 1)];
    }

    // The chunk's tiles.
    void tiles(int chunk, const void** k, const void** v) const {
        const int per_page = kv.page_size / 16, from = chunk * KEY_TILES;
        const size_t bytes = kv.stored_tile();
        for (int i = 0, p = from / per_page, inside = from % per_page; i < KEY_TILES; p++, inside = 0) {
            const size_t base = kv.tile(page(p), head, 0);
            for (; inside < per_page && i < KEY_TILES; inside++, i++)
                k[i] = kv.k + base + inside * bytes, v[i] = kv.v + base + inside * bytes;
        }
    }
};

namespace {

void clear_state(float* state, int padded) {
    memset(state, 0, (size_t)(padded + 16) * 4);
    state[padded] = -INFINITY;
}

}  // namespace

void AttentionPlan::run_item(int index, const Kernels& kernels, const AttendArgs& args, Scratch& mine) {
    const Item& item = items_[index];
    const Node& node = nodes_[item.node];
    const Sequence& s = sequences_[node.sequence];
    const int group = heads_.group(), packed = item.rows * group;
    for (int p = 0; p < packed; p++) clear_state(mine.states.data() + (size_t)p * record(), padded_);
    const size_t q_row = (size_t)padded_ * (args.kv->compute() == KV_F32 ? 4 : 2);
    const int* rows = row_lists_.data() + node.row_list + item.row;
    int begin = INT32_MAX, end = 0;  // what the rows may read
    for (int p = 0; p < packed; p++) {
        const int row = rows[p / group], position = row_position_[row];
        const size_t from = (size_t)row * heads_.query + item.head * group + p % group;
        memcpy(mine.q.data() + p * q_row, (const uint8_t*)args.q + from * q_row, q_row);
        begin = std::min(begin, args.window ? std::max(0, position - args.window + 1) : 0);
        end = std::max(end, position + 1);
    }
    const int length = s.real_length();
    if (s.page_positions) begin = 0, end = length;
    bool follows = false;
    for (int c = item.first; c < item.last; c++) {
        const bool read = c * CHUNK < std::min(end, length) && (c + 1) * CHUNK > begin;
        if (read) {
            const int first = c * CHUNK;
            load_chunk(index, kernels, args,
                       {c, std::max(0, begin - first), std::min({CHUNK, end - first, length - first}), follows,
                        packed > kernels.queries}, mine);
            for (int p = 0; p < packed; p += MAX_QUERIES)
                run_rows({item, p, std::min(MAX_QUERIES, packed - p)}, kernels, args, c, mine);
        }
        follows = read;
        if (!node.whole && (item.first > 0 || c + 1 == item.last))
            keep_piece(item, item.piece + (item.first == 0 ? 0 : c - item.first), mine);
    }
    if (!node.whole) return;
    for (int p = 0; p < packed; p++)
        finish(mine.states.data() + (size_t)p * record(), rows[p / group], item.head * group + p % group, kernels, args);
}

// Store the rows' states, which will be merged with those of other items.
void AttentionPlan::keep_piece(const Item& item, int piece, Scratch& mine) {
    const int group = heads_.group();
    const int* rows = row_lists_.data() + nodes_[item.node].row_list + item.row;
    for (int p = 0; p < item.rows * group; p++) {
        float* from = mine.states.data() + (size_t)p * record();
        memcpy(state(row_state_[rows[p / group]], piece, item.head * group + p % group), from, record() * 4);
        clear_state(from, padded_);
    }
}

// The chunk's keys, and what to fetch meanwhile: the next chunk, or the first one of the next item.
void AttentionPlan::load_chunk(int index, const Kernels& kernels, const AttendArgs& args, const Wanted& what,
                               Scratch& mine) const {
    const int chunk = what.chunk;
    const Item& item = items_[index];
    const Reader reader{sequences_[nodes_[item.node].sequence], *args.kv, args.first_page, item.head};
    KeyBlock& keys = mine.keys;
    keys.stored = STORE_BF16, keys.coded = keys.lows = false, keys.next_shift = 0;
    if (args.kv->layout != TILED) return gather(reader, chunk, mine);
    if (what.follows) {
        memcpy(keys.k, keys.next_k, sizeof keys.k), memcpy(keys.v, keys.next_v, sizeof keys.v);
    } else {
        reader.tiles(chunk, keys.k, keys.v);
    }
    if (chunk + 1 < item.last || index + 1 >= (int)items_.size()) {
        reader.tiles(chunk + 1, keys.next_k, keys.next_v);
    } else {
        const Item& next = items_[index + 1];
        Reader{sequences_[nodes_[next.node].sequence], *args.kv, args.first_page, next.head}.tiles(
            next.first, keys.next_k, keys.next_v);
    }
    if (args.kv->coded()) use_codes(kernels, *args.kv, what, mine);
}

// A few rows decode codes in registers. For more rows they become tiles of bfloat16 of this thread's own, once for all. Scales
// are applied to scores and weights, so decoding rounds nothing, and both ways give the same bits.
void AttentionPlan::use_codes(const Kernels& kernels, const KVMemory& kv, const Wanted& what, Scratch& mine) const {
    KeyBlock& keys = mine.keys;
    const size_t codes = code_bytes(kv.stored, padded_), tile = kv.tile_bytes();
    keys.coded = true, keys.lows = kv.stored == STORE_INT4, keys.next_shift = keys.lows ? 2 : 1;
    if (!what.many) keys.stored = kv.stored;
    for (int i = what.first / 32 * 2; i < std::min(KEY_TILES, (what.last + 31) / 32 * 2); i++) {
        const uint8_t *k = (const uint8_t*)keys.k[i], *v = (const uint8_t*)keys.v[i];
        keys.k_scales[i] = (const float*)(k + codes), keys.v_scales[i] = (const float*)(v + codes);
        for (const void* next : {keys.next_k[i], keys.next_v[i]})
            for (size_t at = codes; at < kv.stored_tile(); at += 64) __builtin_prefetch((const uint8_t*)next + at);
        if (!what.many) continue;
        kernels.decode[kv.stored](k, 1, padded_ / 2, mine.k.data() + i * tile);
        kernels.decode[kv.stored](v, 8, padded_ / 16, mine.v.data() + i * tile);
        keys.k[i] = mine.k.data() + i * tile, keys.v[i] = mine.v.data() + i * tile;
    }
}

// Other layouts: the chunk's keys as tiles of this thread's own.
void AttentionPlan::gather(const Reader& reader, int chunk, Scratch& mine) const {
    const KVMemory& kv = reader.kv;
    const size_t tile = kv.tile_bytes();
    memset(mine.k.data(), 0, tile * KEY_TILES), memset(mine.v.data(), 0, tile * KEY_TILES);
    const int end = std::min((chunk + 1) * CHUNK, std::min(reader.s.real_length(), reader.s.num_pages * kv.page_size));
    for (int t = chunk * CHUNK; t < end;) {
        const int inside = t % kv.page_size, some = std::min(kv.page_size - inside, end - t);
        gather_tokens(kv, reader.page(t / kv.page_size), reader.head, inside, some, t - chunk * CHUNK, mine.k.data(),
                      mine.v.data());
        t += some;
    }
    for (int i = 0; i < KEY_TILES; i++) {
        mine.keys.k[i] = mine.keys.next_k[i] = mine.k.data() + tile * i;
        mine.keys.v[i] = mine.keys.next_v[i] = mine.v.data() + tile * i;
    }
}

// The result of a row that has read nothing is 0.
void AttentionPlan::finish(float* state, int row, int query_head, const Kernels& kernels,
                           const AttendArgs& args) const {
    const float most = state[padded_], sum = state[padded_ + 1];
    kernels.scale(state, sum == 0 ? 0.0f : 1.0f / sum, padded_, state);
    memcpy(args.out + (size_t)row * args.out_stride + query_head * heads_.dim, state, (size_t)heads_.dim * 4);
    if (args.lse) args.lse[(size_t)row * heads_.query + query_head] = most + std::log(sum);
}

// One chunk for a few packed rows, merged into their states.
void AttentionPlan::run_rows(const Rows& rows, const Kernels& kernels, const AttendArgs& args, int chunk,
                             Scratch& mine) {
    const Item& item = rows.item;
    const Node& node = nodes_[item.node];
    const Sequence& s = sequences_[node.sequence];
    const int* list = row_lists_.data() + node.row_list + item.row;
    const int group = heads_.group(), first = chunk * CHUNK, end = std::min(CHUNK, s.real_length() - first);
    const bool listed = s.page_positions != nullptr;
    const KVType type = args.kv->compute();
    const size_t q_row = (size_t)padded_ * (type == KV_F32 ? 4 : 2);
    alignas(64) float scores[MAX_QUERIES * KEYS];
    alignas(64) float out[MAX_QUERIES * 512];
    State state;
    state.out = out, state.stride = padded_;
    int positions[MAX_QUERIES], nearest = KEYS, farthest = -1;
    float* records[MAX_QUERIES];
    for (int r = 0; r < rows.count; r++) {
        const int at = positions[r] = row_position_[list[(rows.first + r) / group]];
        state.from[r] = listed || !args.window ? 0 : std::max(0, at - args.window + 1 - first);
        state.to[r] = listed ? end - 1 : std::min(at - first, end - 1);
        nearest = std::min(nearest, state.from[r]), farthest = std::max(farthest, state.to[r]);
        records[r] = mine.states.data() + (size_t)(rows.first + r) * record();
    }
    if (nearest > farthest) return;
    const bool first_keys = std::all_of(records, records + rows.count, [&](float* r) { return r[padded_ + 1] == 0; });
    if (first_keys) state.out = records[0], state.stride = record();  // nothing to merge with
    KeyBlock& keys = mine.keys;
    keys.first = nearest / 32 * 2, keys.last = farthest / 32 * 2 + 2;
    kernels.scores[type](mine.q.data() + rows.first * q_row, padded_, rows.count, padded_, keys, scores);
    if (listed || args.variant) {
        alignas(64) int32_t k_pos[KEYS];
        key_positions(s, item.head, first, k_pos);
        const int at = keys.first * 16, n = (keys.last - keys.first) * 16;
        for (int r = 0; r < rows.count; r++) {
            float* row = scores + r * KEYS;
            const int head = item.head * group + (rows.first + r) % group;
            if (args.variant) args.variant(row + at, k_pos + at, n, positions[r], head, args.params);
            if (!listed) continue;
            const int low = args.window ? positions[r] - args.window + 1 : 0;
            for (int k = at; k < at + n; k++)
                if (k_pos[k] > positions[r] || k_pos[k] < low) row[k] = -INFINITY;
        }
    }
    kernels.mix[type](scores, rows.count, padded_, keys, state);
    if (!first_keys) return kernels.merge(records, rows.count, state, padded_);
    for (int r = 0; r < rows.count; r++) records[r][padded_] = state.max[r], records[r][padded_ + 1] = state.sum[r];
}

// Position of each key of the block that begins at index `first` of the list; 0 beyond the list, which is masked.
void AttentionPlan::key_positions(const Sequence& s, int head, int first, int32_t* out) const {
    const int32_t* positions = s.page_positions + (s.lists == 1 ? 0 : (size_t)head * s.num_pages);
    for (int k = 0; k < KEYS; k++) {
        const int t = first + k, p = t / page_size_;
        out[k] = !s.page_positions ? t : p < s.num_pages ? positions[p] + t % page_size_ : 0;
    }
}

void AttentionPlan::run_merge(const Merge& merge, int head, const Kernels& kernels, const AttendArgs& args,
                              Scratch& scratch) {
    const int group = heads_.group();
    Aligned<float>& mine = scratch.states;
    for (int g = 0; g < group; g++) {
        const int q_head = head * group + g;
        clear_state(mine.data(), padded_);
        for (int p = 0; p < merge.pieces; p++) {
            float* from = state(merge.state, p, q_head);
            State piece;
            piece.max[0] = from[padded_], piece.sum[0] = from[padded_ + 1], piece.out = from, piece.stride = record();
            float* into = mine.data();
            kernels.merge(&into, 1, piece, padded_);
        }
        finish(mine.data(), merge.row, q_head, kernels, args);
    }
}

}  // namespace dovetail
