#include "low_rank.h"

#include <cmath>
#include <cstring>

namespace dovetail {

void LowRankKeys::add(const std::vector<int64_t>& aliases, const std::vector<Factors>& layers) {
    std::vector<Layer>& mine = prompts_[next_];
    mine.resize(layers.size());
    for (size_t i = 0; i < layers.size(); i++) pack(layers[i], mine[i]);
    for (size_t i = 0; i < aliases.size(); i++) {
        if ((size_t)aliases[i] >= pages_.size()) pages_.resize((size_t)aliases[i] + 1);
        pages_[(size_t)aliases[i]] = {next_, (int)i};
    }
    extend((int)aliases.size());
    next_++;
}

void LowRankKeys::remove(const std::vector<int64_t>& aliases) {
    for (int64_t a : aliases) {
        prompts_.erase(pages_[(size_t)a].prompt);
        pages_[(size_t)a] = {};
    }
}

// Two rows of the basis side by side, as products of bfloat16 pairs take them. A rank that is odd ends with a row of zeros.
void LowRankKeys::pack(const Factors& from, Layer& to) const {
    const int n = padded(), width = shape_.heads * shape_.dim;
    to.coefficients = from.coefficients, to.rank = from.rank;
    to.basis.resize(head_basis(from.rank) * shape_.heads, (uint8_t)0);
    for (int h = 0; h < shape_.heads; h++)
        for (int r = 0; r < from.rank; r++)
            for (int d = 0; d < shape_.dim; d++) {
                const size_t in = (size_t)r * width + h * shape_.dim + d;
                uint8_t* base = to.basis.data() + h * head_basis(from.rank);
                if (shape_.type == KV_F32) ((float*)base)[(size_t)r * n + d] = ((const float*)from.basis)[in];
                else ((uint16_t*)base)[((size_t)(r / 2) * n + d) * 2 + r % 2] = ((const uint16_t*)from.basis)[in];
            }
}

void LowRankKeys::extend(int pages) {
    const size_t half = shape_.frequencies.size(), tokens = (size_t)pages * shape_.page_size;
    for (size_t t = angles_.size() / (2 * half); t < tokens; t++)
        for (int part = 0; part < 2; part++)
            for (float f : shape_.frequencies) {
                const float angle = (float)t * f;
                angles_.push_back((part ? std::sin(angle) : std::cos(angle)) * shape_.temper);
            }
}

void LowRankKeys::rebuild(const Kernels& kernels, const AliasPlace& at, uint8_t* out) const {
    const Page& page = pages_[(size_t)at.alias];
    const Layer& layer = prompts_.at(page.prompt)[(size_t)at.layer];
    const int n = padded(), first = page.index * shape_.page_size;
    const size_t tile = 16 * (size_t)n * element();
    for (int t = 0; t < shape_.page_size; t += 16) {
        const int token = first + t;
        RebuildArgs args{layer.coefficients + (size_t)token * layer.rank * element(), layer.rank,
                         layer.basis.data() + at.head * head_basis(layer.rank), n, shape_.dim,
                         angles_.data() + (size_t)token * shape_.dim, out + (t / 16) * tile};
        kernels.rebuild[shape_.type](args);
    }
}

}  // namespace dovetail
