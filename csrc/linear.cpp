#include "linear.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace dovetail {

namespace {

constexpr int ALONE = 2;      // rows up to which every thread prepares all activations itself
constexpr int CHUNKS = 4;     // pieces per thread
constexpr int GATE_TILES = 8; // tiles of gate and of up that are computed before they are combined

Aligned<uint8_t>& own_rows() {
    thread_local Aligned<uint8_t> rows;
    return rows;
}

Aligned<float>& own_floats() {
    thread_local Aligned<float> floats;
    return floats;
}

}  // namespace

LinearOp::LinearOp(LinearArgs args, const Slot& in, const Slot& out, const Kernels& kernels)
    : args_(std::move(args)), in_width_(in.width) {
    k_blocks_ = (in.width + BLOCK - 1) / BLOCK;
    row_bytes_ = activation_bytes(args_.activation, k_blocks_);
    int column = 0;
    for (const auto& w : args_.weights) {
        if (w->k != in.width) throw std::invalid_argument("a weight's width differs from its input's");
        if (!kernels.gemm[w->format][args_.activation][1][1]) throw std::invalid_argument("no kernel for this weight");
        segments_.push_back({w.get(), column, tiles_});
        if (!args_.gate) column += w->n;
        tiles_ += w->tiles;
    }
    if (args_.gate) {
        if (args_.weights.size() != 2 || args_.weights[0]->n != args_.weights[1]->n)
            throw std::invalid_argument("a gate takes two weights of one shape");
        tiles_ /= 2, column = args_.weights[0]->n;
    }
    if (column != out.width) throw std::invalid_argument("the weights' columns differ from the output's width");
    if (!args_.bias.empty() && (int)args_.bias.size() != (args_.gate ? 2 : 1) * column)
        throw std::invalid_argument("the bias has another length than the output");
    args_.norm.resize(args_.norm.empty() ? 0 : in.stride, 0.0f);
}

int LinearOp::total(const Work& work) const {
    return args_.sampled ? (int)work.step->sampled.size() : work.step->rows();
}

void LinearOp::prepare(const Work& work) {
    const size_t need = (size_t)total(work) * row_bytes_;
    if (rows_.size() < need) rows_.resize(need);
}

void LinearOp::activate(const Kernels& kernels, const float* x, uint8_t* row) const {
    if (!args_.norm.empty()) {
        Aligned<float>& y = own_floats();
        if ((int)y.size() < k_blocks_ * BLOCK) y.resize(k_blocks_ * BLOCK);
        kernels.rms_norm(x, args_.norm.data(), args_.eps, in_width_, y.data());
        for (int i = (in_width_ + 15) / 16 * 16; i < k_blocks_ * BLOCK; i++) y[i] = 0;
        x = y.data();
    }
    kernels.activate[args_.activation](x, k_blocks_, row);
}

void LinearOp::run(Member& member, const Work& work) {
    const int n = total(work);
    if (n == 0) return;
    const Slot& in = (*work.slots)[args_.in];
    auto input = [&](int r) {
        return in.data.data() + (size_t)(args_.sampled ? work.step->sampled[r] : r) * in.stride;
    };
    const uint8_t* rows = rows_.data();
    if (n <= ALONE) {
        Aligned<uint8_t>& mine = own_rows();
        if (mine.size() < n * row_bytes_) mine.resize(n * row_bytes_);
        for (int r = 0; r < n; r++) activate(*work.kernels, input(r), mine.data() + r * row_bytes_);
        rows = mine.data();
    } else {
        const int each = std::max(1, n / (member.threads() * CHUNKS));
        member.share((n + each - 1) / each, [&](int c) {
            for (int r = c * each; r < std::min(n, (c + 1) * each); r++)
                activate(*work.kernels, input(r), rows_.data() + r * row_bytes_);
        });
    }
    const int most = n <= work.kernels->rows_small ? 64 : args_.gate ? GATE_TILES : 2 * MAX_TILES;
    const int each = std::clamp(tiles_ / (member.threads() * CHUNKS), 1, most);
    member.share((tiles_ + each - 1) / each, [&](int c) {
        const int first = c * each, last = std::min(tiles_, first + each);
        if (args_.gate) gates(work, rows, first, last);
        else tiles(work, rows, first, last);
    });
}

void LinearOp::tiles(const Work& work, const uint8_t* rows, int first, int last) const {
    const int n = total(work);
    const Kernels& k = *work.kernels;
    const bool few = n <= k.rows_small;
    const int step = few ? 1 : n <= 4 * k.rows_small ? k.tiles_small : k.tiles_large;
    for (const Segment& s : segments_) {
        const int from = std::max(first, s.first_tile) - s.first_tile;
        const int to = std::min(last, s.first_tile + s.weights->tiles) - s.first_tile;
        for (int t = from; t < to;) {
            const int count = std::min(step, to - t);
            const int most = count == 1 ? k.rows_small : count == 2 ? k.rows_large : k.rows_small;
            const int blocks = (n + most - 1) / most;
            for (int b = 0; b < blocks; b++) {
                const int row = (int)((int64_t)n * b / blocks), end = (int)((int64_t)n * (b + 1) / blocks);
                block(work, s, t, count, rows, row, end - row);
            }
            t += count;
        }
    }
}

void LinearOp::block(const Work& work, const Segment& s, int tile, int count, const uint8_t* rows, int row,
                     int n) const {
    const Packed& w = *s.weights;
    alignas(64) float out[MAX_ROWS * MAX_TILES * TILE];
    work.kernels->gemm[w.format][args_.activation][n][count](w.tile(tile), w.tile_stride, k_blocks_,
                                                             rows + row * row_bytes_, row_bytes_, out,
                                                             MAX_TILES * TILE);
    const int column = tile * TILE, columns = std::min(count * TILE, w.n - column);
    for (int r = 0; r < n; r++) finish(work, row + r, s.column + column, columns, out + r * MAX_TILES * TILE);
}

void LinearOp::finish(const Work& work, int row, int column, int n, const float* values) const {
    const Slot& out = (*work.slots)[args_.out];
    float* to = const_cast<float*>(out.data.data()) + (size_t)row * out.stride + column;
    if (!args_.bias.empty()) {
        const float* bias = args_.bias.data() + column;
        if (args_.add)
            for (int i = 0; i < n; i++) to[i] += values[i] + bias[i];
        else
            for (int i = 0; i < n; i++) to[i] = values[i] + bias[i];
    } else if (n % 16 == 0) {
        if (args_.add) work.kernels->add(values, n, to);
        else memcpy(to, values, (size_t)n * 4);
    } else {
        for (int i = 0; i < n; i++) to[i] = args_.add ? to[i] + values[i] : values[i];
    }
}

// Tiles [first, last) of both weights, first all of the gate's, so that each is read in one stream.
void LinearOp::gates(const Work& work, const uint8_t* rows, int first, int last) const {
    const Kernels& k = *work.kernels;
    const Slot& out = (*work.slots)[args_.out];
    const int n = total(work), width = GATE_TILES * TILE;
    const bool few = n <= k.rows_small;
    const int step = few ? 1 : n <= 4 * k.rows_small ? k.tiles_small : k.tiles_large;
    const int most = step == 2 ? k.rows_large : k.rows_small, blocks = (n + most - 1) / most;
    alignas(64) float values[2][MAX_ROWS * GATE_TILES * TILE];
    for (int from = first; from < last; from += GATE_TILES) {
        const int to = std::min(last, from + GATE_TILES);
        for (int b = 0; b < blocks; b++) {
            const int row = (int)((int64_t)n * b / blocks), some = (int)((int64_t)n * (b + 1) / blocks) - row;
            for (int w = 0; w < 2; w++)
                for (int t = from; t < to;) {
                    const int count = std::min(step, to - t);
                    const Packed& p = *segments_[w].weights;
                    k.gemm[p.format][args_.activation][some][count](p.tile(t), p.tile_stride, k_blocks_,
                                                                    rows + row * row_bytes_, row_bytes_,
                                                                    values[w] + (t - from) * TILE, width);
                    t += count;
                }
            const int column = from * TILE, columns = std::min((to - from) * TILE, out.width - column);
            for (int r = 0; r < some; r++) {
                float *gate = values[0] + r * width, *up = values[1] + r * width;
                if (!args_.bias.empty())
                    for (int i = 0; i < columns; i++)
                        gate[i] += args_.bias[column + i], up[i] += args_.bias[out.width + column + i];
                k.gate(args_.gate, gate, up, (columns + 15) / 16 * 16, gate);
                memcpy(const_cast<float*>(out.data.data()) + (size_t)(row + r) * out.stride + column, gate,
                       (size_t)columns * 4);
            }
        }
    }
}

}  // namespace dovetail
