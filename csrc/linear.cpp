#include "linear.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace dovetail {

namespace {

constexpr int ALONE = 4;       // up to so many rows, every thread prepares all activations itself
constexpr int CHUNKS = 12;     // pieces per thread: others may have to wait for its last piece
constexpr int GATE_TILES = 8;  // tiles of gate and of up that are computed before they are combined
constexpr int AHEAD = 4096;    // bytes that a stream of weights is fetched ahead
constexpr size_t PANEL = 256 << 10;  // bytes of activation rows that stay in a core's cache

// Results of many rows are written to lines that are in no cache. They arrive while the products are computed.
void fetch_results(const float* out, int stride, int rows, int columns) {
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < columns; i += 16) __builtin_prefetch(out + (size_t)r * stride + i, 1);
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
        if (w->row_rule() != args_.weights[0]->row_rule()) throw std::invalid_argument("weights of one product take rows of different kinds");
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
    shared_ = args_.weights[0]->shared;
}

int LinearOp::total(const Work& work) const {
    return args_.sampled ? (int)work.step->sampled.size() : work.step->rows();
}

size_t LinearOp::weight_bytes() const {
    size_t bytes = 0;
    for (const Segment& s : segments_) bytes += s.weights->bytes;
    return bytes;
}

BlockShape LinearOp::shape(const Kernels& kernels, int n) const {
    BlockShape all = shape(kernels, *segments_[0].weights, n);
    for (const Segment& s : segments_) {
        const BlockShape one = shape(kernels, *s.weights, n);
        all = {std::min(all.rows, one.rows), std::max(all.tiles, one.tiles)};
    }
    return all;
}

void LinearOp::prepare(const Work& work) {
    const size_t need = (size_t)total(work) * row_bytes_ + 64;  // sums of the last row are read a vector at a time
    if (work.rows->size() < need) work.rows->resize(need);
    const size_t mine = ALONE * row_bytes_ + 2 * floats() * sizeof(float);
    for (Aligned<uint8_t>& own : *work.own)
        if (own.size() < mine) own.resize(mine);
}

void LinearOp::activate(const Work& work, int r, const float* x, uint8_t* row, float* own) const {
    if (!args_.norm.empty()) {
        work.kernels->rms_norm(x, args_.norm.data(), args_.eps, in_width_, own);
        for (int i = (in_width_ + 15) / 16 * 16; i < k_blocks_ * BLOCK; i++) own[i] = 0;
        x = own;
    }
    if (const auto* order = (const int32_t*)shared_[ORDER]) {
        float* ordered = own + floats();
        for (int i = 0; i < in_width_; i++) ordered[i] = x[order[i]];
        for (int i = in_width_; i < k_blocks_ * BLOCK; i++) ordered[i] = 0;
        x = ordered;
    }
    const Step& step = *work.step;
    const size_t at = args_.sampled ? step.sampled[r] : r;
    const int position = at < step.positions.size() ? step.positions[at] : 0;
    work.kernels->activate[args_.activation]({x, k_blocks_, row, position, shared_});
}

void LinearOp::run(Member& member, const Work& work) {
    const int n = total(work);
    if (n == 0) return;
    const Slot& in = (*work.slots)[args_.in];
    auto input = [&](int r) {
        return in.data.data() + (size_t)(args_.sampled ? work.step->sampled[r] : r) * in.stride;
    };
    const uint8_t* rows = work.rows->data();
    uint8_t* mine = (*work.own)[member.id].data();
    float* floats = (float*)(mine + ALONE * row_bytes_);
    if (n <= ALONE) {
        for (int r = 0; r < n; r++) activate(work, r, input(r), mine + r * row_bytes_, floats);
        rows = mine;
    } else {
        const int each = std::max(1, n / (member.threads() * CHUNKS));
        member.share((n + each - 1) / each, [&](int c) {
            for (int r = c * each; r < std::min(n, (c + 1) * each); r++)
                activate(work, r, input(r), work.rows->data() + r * row_bytes_, floats);
        });
    }
    const Kernels& k = *work.kernels;
    const bool few = n <= k.rows_alone;
    const auto [many, step] = shape(k, n);
    const int least = many > MAX_ROWS ? 1 : 4;
    const int fit = std::max(least, (int)(PANEL / row_bytes_ / many)) * many;
    const int panels = few ? 1 : (n + fit - 1) / fit, blocks = (n + many - 1) / many;
    // A piece consists of whole register blocks.
    const int each = std::clamp(tiles_ / (member.threads() * CHUNKS * step), 1, few ? 64 : 3) * step;
    const int chunks = (tiles_ + each - 1) / each;
    member.share(panels * chunks, [&](int i) {
        const int p = i / chunks, c = i % chunks;
        const int row = blocks * p / panels * many, end = std::min(n, blocks * (p + 1) / panels * many);
        panel(work, rows, row, end - row, c * each, std::min(tiles_, (c + 1) * each));
    });
}

void LinearOp::panel(const Work& work, const uint8_t* rows, int row, int n, int first, int last) const {
    if (args_.gate) gates(work, rows, row, n, first, last);
    else tiles(work, rows, row, n, first, last);
}

// n rows times `count` tiles. With few rows, the weights behind these are fetched meanwhile. Otherwise each of the `parts`
// groups of rows fetches its share of the next group of tiles.
void LinearOp::multiply(const Kernels& kernels, const Packed& w, const Block& block, const Target& to) const {
    const size_t group = block.count * w.tile_stride, all = (group / k_blocks_ + 63) / 64;
    const int each = ((int)all + block.parts - 1) / block.parts, sharers = ((int)all + each - 1) / each;
    const int share = block.part - (block.parts - sharers);  // the last ones: just before the group is read
    const int lines = block.ahead && share >= 0 ? each : 0;
    const uint8_t* tile = w.tile(block.tile);
    const bool stream = block.parts == 1 && block.count == 1;
    const uint8_t* ahead = tile + (stream ? AHEAD : group + (size_t)share * each * 64 * k_blocks_);
    const Gemm gemm = block.n > MAX_ROWS ? kernels.tall[w.format][args_.activation]
                                         : kernels.gemm[w.format][args_.activation][block.n][block.count];
    gemm({tile, w.tile_stride, k_blocks_, block.rows, row_bytes_, to.out, to.stride, to.add, ahead, lines, block.n,
          block.count, w.grid, w.shared});
}

void LinearOp::tiles(const Work& work, const uint8_t* rows, int row, int n, int first, int last) const {
    const Kernels& k = *work.kernels;
    Slot& out = (*work.slots)[args_.out];
    alignas(64) float values[TALL_ROWS * MAX_TILES * TILE];
    for (const Segment& s : segments_) {
        const Packed& w = *s.weights;
        const auto [most, step] = shape(k, w, n);
        const int blocks = (n + most - 1) / most;
        const int to = std::min(last, s.first_tile + w.tiles) - s.first_tile;
        for (int t = std::max(first, s.first_tile) - s.first_tile, count; t < to; t += count) {
            count = std::min(step, to - t);
            const int column = s.column + t * TILE, columns = std::min(count * TILE, w.n - t * TILE);
            const bool direct = columns == count * TILE && args_.bias.empty();
            for (int b = 0; b < blocks; b++) {
                const int at = row + n * b / blocks, some = row + n * (b + 1) / blocks - at;
                const Block block{t, count, rows + at * row_bytes_, some, b, blocks, ahead(work, n)};
                float* results = out.data.data() + (size_t)at * out.stride + column;
                if (blocks > 1) fetch_results(results, out.stride, some, columns);
                if (direct) {
                    multiply(k, w, block, {results, out.stride, args_.add});
                    continue;
                }
                multiply(k, w, block, {values, MAX_TILES * TILE, false});
                for (int r = 0; r < some; r++) finish(out, at + r, column, columns, values + r * MAX_TILES * TILE);
            }
        }
    }
}

// A row of values into columns [column, column + n).
void LinearOp::finish(Slot& out, int row, int column, int n, const float* values) const {
    float* to = out.data.data() + (size_t)row * out.stride + column;
    for (int i = 0; i < n; i++) {
        const float x = args_.bias.empty() ? values[i] : values[i] + args_.bias[column + i];
        to[i] = args_.add ? to[i] + x : x;
    }
}

// Tiles [first, last) of both weights. With few rows, several tiles of the gate come first, so that each weight is read as
// one stream.
void LinearOp::gates(const Work& work, const uint8_t* rows, int row, int n, int first, int last) const {
    const Kernels& k = *work.kernels;
    Slot& out = (*work.slots)[args_.out];
    const bool few = n <= k.rows_alone;
    const auto [most, step] = shape(k, n);
    const int blocks = (n + most - 1) / most, together = few ? GATE_TILES : step;
    const int width = (few ? GATE_TILES : MAX_TILES) * TILE;
    alignas(64) float values[2][std::max(MAX_ROWS * GATE_TILES, TALL_ROWS * MAX_TILES) * TILE];
    for (int from = first, to; from < last; from = to) {
        to = std::min(last, from + together);
        const int column = from * TILE, columns = std::min((to - from) * TILE, out.width - column);
        for (int b = 0; b < blocks; b++) {
            const int at = row + n * b / blocks, some = row + n * (b + 1) / blocks - at;
            float* results = out.data.data() + (size_t)at * out.stride + column;
            if (blocks > 1) fetch_results(results, out.stride, some, columns);
            for (int w = 0; w < 2; w++)
                for (int t = from, count; t < to; t += count) {
                    count = std::min(shape(k, *segments_[w].weights, n).tiles, to - t);
                    multiply(k, *segments_[w].weights, {t, count, rows + at * row_bytes_, some, b, blocks, ahead(work, n)},
                             {values[w] + (t - from) * TILE, width, false});
                }
            if (!args_.bias.empty())
                for (int r = 0; r < some; r++)
                    for (int i = 0; i < columns; i++) {
                        values[0][r * width + i] += args_.bias[column + i];
                        values[1][r * width + i] += args_.bias[out.width + column + i];
                    }
            // Up to a whole vector. What lies beyond the slot's width stays zero, because the weights' padding is zero.
            k.gate({args_.gate, values[0], values[1], width, results, out.stride, some, (columns + 15) / 16 * 16});
        }
    }
}

}  // namespace dovetail
