#include "low_rank.h"

#include <cmath>
#include <cstring>

namespace dovetail {

constexpr int KEPT = 16;  // angles are kept for every so many positions

LowRankKeys::LowRankKeys(KeysShape shape) : shape_(std::move(shape)) {
    for (const Rotation& r : shape_.rotations) {
        Table& table = tables_.emplace_back();
        table.frequencies = r.frequencies, table.frequencies.resize(half());
        table.beyond.resize((size_t)KEPT * 2 * half());
        for (int t = 0; t < KEPT; t++) angles_at(r, t, 1, table.beyond.data() + (size_t)t * 2 * half());
    }
}

void LowRankKeys::angles_at(const Rotation& rotation, int position, double factor, float* out) const {
    for (size_t i = 0; i < rotation.frequencies.size(); i++) {
        const double angle = (double)position * rotation.frequencies[i];
        out[i] = (float)(factor * std::cos(angle)), out[half() + i] = (float)(factor * std::sin(angle));
    }
}

void LowRankKeys::add(const std::vector<int64_t>& aliases, const std::vector<Factors>& layers) {
    std::vector<Layer>& mine = prompts_[next_];
    mine.resize(layers.size());
    for (size_t i = 0; i < layers.size(); i++) pack(layers[i], mine[i]);
    for (size_t i = 0; i < aliases.size(); i++) {
        if ((size_t)aliases[i] >= pages_.size()) pages_.resize((size_t)aliases[i] + 1);
        pages_[(size_t)aliases[i]] = {next_, (int)i};
    }
    extend((int)aliases.size() * (shape_.kv.page_size / KEPT));
    next_++;
}

void LowRankKeys::remove(const std::vector<int64_t>& aliases) {
    for (int64_t a : aliases) {
        prompts_.erase(pages_[(size_t)a].prompt);
        pages_[(size_t)a] = {};
    }
}

// Two rows of the basis side by side, as products of bfloat16 pairs need them. An odd rank ends with a row of zeros.
void LowRankKeys::pack(const Factors& from, Layer& to) const {
    const int n = padded(), width = shape_.kv.heads * shape_.kv.dim;
    to.coefficients = from.coefficients, to.rank = from.rank;
    to.basis.resize(head_basis(from.rank) * shape_.kv.heads, (uint8_t)0);
    for (int h = 0; h < shape_.kv.heads; h++)
        for (int r = 0; r < from.rank; r++)
            for (int d = 0; d < shape_.kv.dim; d++) {
                const size_t in = (size_t)r * width + h * shape_.kv.dim + d;
                uint8_t* base = to.basis.data() + h * head_basis(from.rank);
                if (shape_.kv.compute() == KV_F32) ((float*)base)[(size_t)r * n + d] = ((const float*)from.basis)[in];
                else ((uint16_t*)base)[((size_t)(r / 2) * n + d) * 2 + r % 2] = ((const uint16_t*)from.basis)[in];
            }
}

void LowRankKeys::extend(int tiles) {
    const size_t each = 2 * half();
    for (size_t r = 0; r < tables_.size(); r++) {
        const Rotation& rotation = shape_.rotations[r];
        std::vector<float>& at = tables_[r].at_tiles;
        const size_t known = at.size() / each;
        if ((size_t)tiles > known) at.resize(tiles * each);
        for (size_t t = known; t < (size_t)tiles; t++) angles_at(rotation, (int)t * KEPT, rotation.temper, at.data() + t * each);
    }
}

void LowRankKeys::rebuild(const Kernels& kernels, const AliasPlace& at, uint8_t* out) const {
    const Page& page = pages_[(size_t)at.alias];
    const Layer& layer = prompts_.at(page.prompt)[(size_t)at.layer];
    const Table& table = tables_[(size_t)shape_.of_layer[(size_t)at.layer]];
    const int n = padded(), first = page.index * shape_.kv.page_size;
    const size_t tile = shape_.kv.tile_bytes();
    thread_local std::vector<uint8_t> room;
    if (shape_.kv.coded()) room.resize(tile * (size_t)(shape_.kv.page_size / KEPT));
    uint8_t* to = shape_.kv.coded() ? room.data() : out;
    for (int t = 0; t < shape_.kv.page_size; t += KEPT) {
        const int token = first + t;
        const Angles angles{token, half(), table.frequencies.data(),
                            table.at_tiles.data() + (size_t)(token / KEPT) * 2 * half(), table.beyond.data()};
        RebuildArgs args{layer.coefficients + (size_t)token * layer.rank * element(), layer.rank,
                         layer.basis.data() + at.head * head_basis(layer.rank), n, shape_.kv.dim,
                         angles, to + (t / KEPT) * tile};
        kernels.rebuild[shape_.kv.compute()](args);
    }
    if (shape_.kv.coded()) encode_keys(kernels, shape_.kv, to, out);
}

}  // namespace dovetail
