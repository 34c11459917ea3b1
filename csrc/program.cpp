#include "program.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "linear.h"
#include "small_floats.h"

namespace dovetail {

namespace {

constexpr size_t TUNED = 128 << 20;  // bytes of weights to learn from: more than caches hold, read in milliseconds
constexpr int TRIALS = 3;

}  // namespace

void Step::clear() {
    tokens.clear(), positions.clear(), span_of_row.clear(), offsets.clear(), sampled.clear(), pages.clear();
    tables.clear(), sequences.clear(), spans.clear(), table_start.clear(), aliases.clear(), alias_start.clear(),
        changes.clear();
}

namespace {

float* row(const Work& work, int slot, int r) {
    Slot& s = (*work.slots)[slot];
    return s.data.data() + (size_t)r * s.stride;
}

int pieces(int rows, int threads) { return std::min(rows, threads * 4); }

class EmbedOp : public Op {
   public:
    EmbedOp(int out, Format format, const uint8_t* rows, size_t row_bytes, int width, float scale)
        : out_(out), format_(format), rows_(rows), row_bytes_(row_bytes), width_(width), scale_(scale) {}
    const char* name() const override { return "embed"; }
    void run(Member& member, const Work& work) override {
        member.share(work.step->rows(), [&](int r) {
            float* to = row(work, out_, r);
            dequantize_row(format_, rows_ + (size_t)work.step->tokens[r] * row_bytes_, width_, to);
            if (scale_ != 1.0f)
                for (int i = 0; i < width_; i++) to[i] *= scale_;
        });
    }

   private:
    int out_;
    Format format_;
    const uint8_t* rows_;
    size_t row_bytes_;
    int width_;
    float scale_;
};

// cos and sin of each row's position: [frequencies] each, the second half of the slot's row holding sin.
class AnglesOp : public Op {
   public:
    AnglesOp(int out, std::vector<float> frequencies, float temper)
        : out_(out), frequencies_(std::move(frequencies)), temper_(temper) {}
    const char* name() const override { return "angles"; }
    void run(Member& member, const Work& work) override {
        const int n = (int)frequencies_.size();
        member.share(work.step->rows(), [&](int r) {
            float *cos = row(work, out_, r), *sin = cos + n;
            const float at = (float)work.step->positions[r];
            for (int i = 0; i < n; i++) {
                const float angle = at * frequencies_[i];
                cos[i] = std::cos(angle) * temper_, sin[i] = std::sin(angle) * temper_;
            }
        });
    }

   private:
    int out_;
    std::vector<float> frequencies_;
    float temper_;
};

// Norms per head where the model has them, rotation of q and k, the write of k and v, and q in the compute type.
class RopeOp : public Op {
   public:
    RopeOp(RopeArgs args, const Heads& heads, const KVMemory& kv) : args_(std::move(args)), heads_(heads), kv_(kv) {
        const int padded = kv.padded();
        if (!args_.q_norm.empty()) args_.q_norm.resize(padded, 0.0f);
        if (!args_.k_norm.empty()) args_.k_norm.resize(padded, 0.0f);
    }
    const char* name() const override { return "rope_write"; }
    void run(Member& member, const Work& work) override {
        const int rows = work.step->rows(), heads = heads_.kv;
        if (rows < member.threads() * 4) {
            member.share(rows * heads, [&](int i) { one(work, i / heads, i % heads); });
            return;
        }
        const int count = pieces(rows, member.threads());
        member.share(count, [&](int c) {
            for (int r = (int)((int64_t)rows * c / count); r < (int)((int64_t)rows * (c + 1) / count); r++)
                for (int h = 0; h < heads; h++) one(work, r, h);
        });
    }

   private:
    void one(const Work& work, int r, int h) const {
        const Kernels& k = *work.kernels;
        const int dim = heads_.dim, group = heads_.group(), padded = kv_.padded();
        const float *x = row(work, args_.in, r), *cos = row(work, args_.angles, r), *sin = cos + dim / 2;
        alignas(64) float head[512], turned[512];
        memset(head, 0, padded * 4), memset(turned, 0, padded * 4);
        const float scale = 1.0f / std::sqrt((float)dim);
        auto turn = [&](const float* from, const std::vector<float>& norm, float by) {
            if (!norm.empty()) {
                memcpy(head, from, dim * 4);
                k.rms_norm(head, norm.data(), args_.eps, dim, head);
                from = head;
            }
            k.rotate(from, cos, sin, by, dim, turned);
        };
        turn(x + (heads_.query + h) * dim, args_.k_norm, 1.0f);
        const float* v = x + (heads_.query + heads_.kv + h) * dim;
        const int64_t page = work.step->pages[r] + args_.layer * kv_.pages_per_layer;
        write_token(k, kv_, {page, h, work.step->offsets[r]}, turned, v);
        for (int g = 0; g < group; g++) {
            turn(x + (h * group + g) * dim, args_.q_norm, scale);
            const size_t at = ((size_t)r * heads_.query + h * group + g) * padded;
            float* q = (*work.slots)[args_.q].data.data();
            if (kv_.compute() == KV_BF16) k.to_bf16(turned, padded, (uint16_t*)q + at);
            else memcpy(q + at, turned, padded * 4);
        }
    }

    RopeArgs args_;
    Heads heads_;
    const KVMemory& kv_;
};

class AttendOp : public Op {
   public:
    AttendOp(AttendOn on, int window, Variant variant, std::vector<float> params, const KVMemory& kv)
        : on_(on), window_(window), variant_(variant), params_(std::move(params)), kv_(kv) {}
    const char* name() const override { return "attend"; }
    void prepare(const Work& work) override { plan(work).prepare(kv_); }
    void run(Member& member, const Work& work) override {
        Slot& out = (*work.slots)[on_.out];
        AttendArgs args{&kv_, on_.layer * kv_.pages_per_layer, (*work.slots)[on_.q].data.data(), out.data.data(),
                        out.stride, window_, variant_, params_.data(), nullptr};
        plan(work).run(member, *work.kernels, args);
    }

   private:
    AttentionPlan& plan(const Work& work) const { return on_.chosen && work.chosen ? *work.chosen : *work.plan; }

    AttendOn on_;
    int window_;
    Variant variant_;
    std::vector<float> params_;
    const KVMemory& kv_;
};

// Chooses the pages of a layer, where rows have to.
class PickOp : public Op {
   public:
    PickOp(int q, int layer, Summary kind, int vectors, const uint8_t* summaries, const KVMemory& kv)
        : q_(q), layer_(layer), kind_(kind), vectors_(vectors), summaries_(summaries), kv_(kv) {}
    const char* name() const override { return "pick"; }
    void prepare(const Work& work) override {
        if (work.chosen) work.selection->prepare(args(work), (int)work.own->size());
    }
    void run(Member& member, const Work& work) override {
        if (work.chosen) work.selection->pick(member, *work.kernels, args(work));
    }

   private:
    PickArgs args(const Work& work) const {
        const int64_t first = layer_ * kv_.pages_per_layer;
        const int width = kind_ == LANDMARKS ? (kv_.dim + 31) / 32 * 32 : kv_.padded();
        const size_t bytes = (size_t)kv_.heads * vectors_ * width * kv_.element();
        const uint8_t* summaries = summaries_ ? summaries_ + first * bytes : nullptr;
        return {&kv_, (*work.slots)[q_].data.data(), summaries, kind_, vectors_, first, work.tiers};
    }

    int q_, layer_;
    Summary kind_;
    int vectors_;
    const uint8_t* summaries_;
    const KVMemory& kv_;
};

// Brings the pages that a layer reads to the device: all of the step's, or what was picked.
class FetchOp : public Op {
   public:
    // ahead: begin to bring what the next layer is guessed to read. guessed: that was done for this layer.
    struct What {
        int layer, window;
        bool chosen, ahead, guessed;
    };
    FetchOp(What what, const KVMemory& kv) : what_(what), kv_(kv) {}
    const char* name() const override { return what_.ahead ? "fetch_ahead" : "fetch"; }
    void prepare(const Work&) override { found_.resize(kv_.heads); }
    void run(Member& member, const Work& work) override {
        if (what_.ahead && !work.chosen) return;
        Tiers& tiers = *work.tiers;
        member.share(kv_.heads, [&](int h) { want(work, h); });
        member.share(1, [&](int) {
            misses_.clear();
            for (const auto& f : found_) misses_.insert(misses_.end(), f.begin(), f.end());
            tiers.begin(misses_);
        });
        // A thread may come here late: what it reads stays as it is until all of the program has run.
        const int n = (int)misses_.size();
        if (n && (tiers.addressed() || tiers.rebuilds()))
            member.share(n, [&](int i) {
                if (tiers.addressed()) tiers.copy(misses_[i]);
                tiers.rebuild(misses_[i], *work.kernels);
            });
        if (!what_.ahead && (n || what_.guessed) && tiers.waits()) member.share(1, [&](int) { tiers.arrive(); });
    }

   private:
    void want(const Work& work, int head) {
        std::vector<Tiers::Miss>& misses = found_[head];
        misses.clear();
        if (!what_.ahead) work.tiers->next(head);
        const int64_t first = what_.layer * kv_.pages_per_layer;
        const bool chosen = what_.chosen && work.chosen;
        for (const Sequence& s : chosen ? work.selection->sequences() : work.step->sequences) {
            if (what_.ahead && s.lists == 1 && !s.cut) continue;  // reads everything: no guess
            const int32_t* list = s.pages + (s.lists == 1 ? 0 : (size_t)head * s.num_pages);
            const int skip = what_.window && !s.page_positions ? std::max(0, s.start - what_.window + 1) / kv_.page_size : 0;
            const int count = s.num_pages - (s.cut ? *s.cut / kv_.page_size : 0) - skip;
            work.tiers->want(head, list + skip, count, {first, what_.ahead, what_.ahead}, misses);
        }
    }

    const What what_;
    const KVMemory& kv_;
    std::vector<std::vector<Tiers::Miss>> found_;  // by each head
    std::vector<Tiers::Miss> misses_;
};

// Queries that are projected, rotated and turned: partial ones.
class TurnOp : public Op {
   public:
    TurnOp(TurnArgs args, const Heads& heads, const KVMemory& kv) : args_(std::move(args)), heads_(heads), kv_(kv) {}
    const char* name() const override { return "turn"; }
    void run(Member& member, const Work& work) override {
        if (!work.chosen) return;
        member.share(work.step->rows() * heads_.kv, [&](int i) { one(work, i / heads_.kv, i % heads_.kv); });
    }

   private:
    void one(const Work& work, int r, int h) const {
        const Kernels& k = *work.kernels;
        const int dim = heads_.dim, group = heads_.group(), width = args_.width;
        const float *x = row(work, args_.in, r), *cos = row(work, args_.angles, r), *sin = cos + dim / 2;
        alignas(64) float normed[512], turned[512];
        const float scale = 1.0f / std::sqrt((float)dim);
        uint8_t* out = (uint8_t*)row(work, args_.out, r);
        for (int g = h * group; g < (h + 1) * group; g++) {
            const float* q = x + g * dim;
            if (!args_.q_norm.empty()) {
                memcpy(normed, q, dim * 4);
                k.rms_norm(normed, args_.q_norm.data(), args_.eps, dim, normed);
                q = normed;
            }
            k.rotate(q, cos, sin, scale, dim, turned);
            float sums[512] = {};
            const float* basis = args_.basis + (size_t)h * dim * width;
            for (int d = 0; d < dim; d++)
                for (int c = 0; c < width; c++) sums[c] += turned[d] * basis[(size_t)d * width + c];
            for (int c = 0; c < width; c++) {
                if (kv_.compute() == KV_F32) ((float*)out)[(size_t)g * width + c] = sums[c];
                else ((uint16_t*)out)[(size_t)g * width + c] = to_bf16(sums[c]);
            }
        }
    }

    TurnArgs args_;
    Heads heads_;
    const KVMemory& kv_;
};

// Chooses the pages of a layer by partial keys.
class PickPartialOp : public Op {
   public:
    PickPartialOp(int q, int layer, const uint8_t* keys, int width, float alpha, const KVMemory& kv)
        : q_(q), layer_(layer), keys_(keys), width_(width), alpha_(alpha), kv_(kv) {}
    const char* name() const override { return "pick_partial"; }
    void prepare(const Work& work) override {
        if (work.chosen) work.selection->prepare_partial((int)work.own->size());
    }
    void run(Member& member, const Work& work) override {
        if (work.chosen) work.selection->pick_partial(member, *work.kernels, args(work));
    }

   private:
    PartialArgs args(const Work& work) const {
        const Slot& q = (*work.slots)[q_];
        const size_t page = (size_t)kv_.heads * kv_.page_size * width_ * kv_.element();
        return {&kv_, q.data.data(), q.stride, keys_ + layer_ * kv_.pages_per_layer * page, width_, alpha_};
    }

    int q_, layer_;
    const uint8_t* keys_;
    int width_;
    float alpha_;
    const KVMemory& kv_;
};

}  // namespace

namespace {

// Marks a program as running; a second thread is told so instead of changing what the first one reads.
class Alone {
   public:
    explicit Alone(std::atomic<bool>& running) : running_(running) {
        if (running_.exchange(true)) throw std::runtime_error("a program is run by two threads at once: give each its own");
    }
    ~Alone() { running_ = false; }

   private:
    std::atomic<bool>& running_;
};

}  // namespace

Program::Program(const std::string& isa, int threads, Heads heads, bool cascade, bool split)
    : kernels_(isa.empty() ? best_kernels() : dovetail::kernels(isa.c_str())), team_(threads), heads_(heads),
      cascade_(cascade), split_(split), sampler_(kernels_, threads) {
    if (!kernels_) throw std::invalid_argument("this build or this CPU has no '" + isa + "'");
    own_.resize(threads);
}

int Program::slot(int width, bool sampled) {
    slots_.push_back({width, (width + 31) / 32 * 32 + 16, sampled, {}});
    return (int)slots_.size() - 1;
}

void Program::embed(int out, Format format, const uint8_t* rows, size_t row_bytes, int width, float scale) {
    add(new EmbedOp(out, format, rows, row_bytes, width, scale));
}

void Program::angles(int out, std::vector<float> frequencies, float temper) {
    add(new AnglesOp(out, std::move(frequencies), temper));
}

void Program::linear(LinearArgs args) {
    const Slot &in = slots_.at(args.in), &out = slots_.at(args.out);
    add(new LinearOp(std::move(args), in, out, *kernels_));
}

void Program::rope(RopeArgs args) { add(new RopeOp(std::move(args), heads_, kv_)); }

void Program::attend(AttendOn on, int window, Variant variant, std::vector<float> params) {
    add(new AttendOp(on, window, variant, std::move(params), kv_));
}

void Program::pick(int q, int layer, Summary kind, int vectors, const uint8_t* summaries) {
    add(new PickOp(q, layer, kind, vectors, summaries, kv_));
}

void Program::summarise(Summary kind, int layers, const std::vector<int64_t>& pages, uint8_t* out, int vectors) {
    const Alone alone(running_);
    team_.reserve(1);
    if (!tiers_) {
        team_.run([&](Member& member) { dovetail::summarise(member, *kernels_, kv_, kind, layers, pages, out, vectors); });
        return;
    }
    for (int layer = 0; layer < layers; layer++) {  // what one layer needs fits on the device, all of them may not
        tiers_->bring(layer, pages, false);
        std::vector<int64_t> of_layer(pages);
        for (int64_t& p : of_layer) p += layer * kv_.pages_per_layer;
        team_.run([&](Member& member) { dovetail::summarise(member, *kernels_, kv_, kind, 1, of_layer, out, vectors); });
    }
}

void Program::fetch(int layer, int window, bool chosen, bool guessed) {
    add(new FetchOp({layer, window, chosen, false, guessed}, kv_));
    layers_ = std::max(layers_, layer + 1);
}

void Program::fetch_ahead(int layer) { add(new FetchOp({layer, 0, true, true, false}, kv_)); }

void Program::turn(TurnArgs args) { add(new TurnOp(std::move(args), heads_, kv_)); }

void Program::pick_partial(int q, int layer, const uint8_t* keys, int width, float alpha) {
    add(new PickPartialOp(q, layer, keys, width, alpha, kv_));
}

void Program::seal_partial(const TurnedKeys& to, const std::vector<int64_t>& pages) {
    const Alone alone(running_);
    team_.reserve(1);
    const int heads = kv_.heads, per_page = kv_.page_size / 16, n = (int)pages.size();
    const size_t tile = (size_t)16 * to.width * kv_.element();
    for (int layer = to.first; layer < to.layers; layer++) {
        if (tiers_) tiers_->bring(layer, pages, false);
        const int64_t first = layer * kv_.pages_per_layer;
        team_.run([&](Member& member) {
            member.share(n * heads, [&](int i) {
                const int64_t page = pages[i / heads] + first;
                const float* basis = to.basis + ((size_t)layer * heads + i % heads) * heads_.dim * to.width;
                uint8_t* out = to.out + ((size_t)page * heads + i % heads) * per_page * tile;
                for (int t = 0; t < per_page; t++)
                    kernels_->turn_keys[kv_.compute()](kv_.k + kv_.tile(page, i % heads, t), heads_.dim, basis, to.width,
                                                       out + t * tile);
            });
        });
    }
}

// Room, until the step ends, for what it writes.
void Program::hold() {
    tiers_->step();
    std::vector<int32_t> pages(step.pages.begin(), step.pages.end());
    std::sort(pages.begin(), pages.end());
    pages.erase(std::unique(pages.begin(), pages.end()), pages.end());
    std::vector<Tiers::Miss> misses;
    for (int h = 0; h < kv_.heads; h++) {
        tiers_->next(h);
        for (int layer = 0; layer < layers_; layer++) {
            const int64_t first = layer * kv_.pages_per_layer;
            tiers_->want(h, pages.data(), (int)pages.size(), {first, layers_ + 1, false}, misses);
        }
    }
    tiers_->fetch(misses);
    for (int h = 0; h < kv_.heads; h++)
        for (int layer = 0; layer < layers_; layer++)
            for (int32_t p : pages) tiers_->touch(h, layer * kv_.pages_per_layer + p);
}

void Program::fit(int rows) {
    for (Slot& s : slots_) {
        const size_t need = (s.sampled ? step.sampled.size() : (size_t)rows) * s.stride;
        if (s.data.size() < need) s.data.resize(need, 0.0f);
    }
}

void Program::tune() {
    const Alone alone(running_);
    std::vector<Op*> some;
    size_t bytes = 0;
    for (size_t i = 0; i < ops_.size() && bytes < TUNED; i++)
        if (ops_[i]->weight_bytes()) some.push_back(ops_[i].get()), bytes += ops_[i]->weight_bytes();
    if (bytes < TUNED / 16) return;  // hardly anything to gain
    step.clear();
    step.tokens.resize(1), step.sampled.assign(1, 0);
    fit(1);
    double best[2] = {1e9, 1e9};
    for (int i = 0; i < 2 * TRIALS; i++) {
        const bool ahead = i % 2;
        const Work work = this->work(ahead);
        int phases = 0;
        for (Op* op : some) op->prepare(work), phases += op->phases();
        team_.reserve(phases);
        const auto start = std::chrono::steady_clock::now();
        team_.run([&](Member& member) {
            for (Op* op : some) op->run(member, work);
        });
        const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
        best[ahead] = std::min(best[ahead], took.count());
    }
    ahead_ = best[1] <= best[0];
    step.clear();
}

void Program::plan() {
    const Alone alone(running_);
    for (size_t i = 0; i < step.sequences.size(); i++)
        step.spans[i].pages = step.sequences[i].pages = step.tables.data() + step.table_start[i];
    for (size_t i = 0; i < step.spans.size(); i++) step.spans[i].aliases = step.aliases.data() + step.alias_start[i];
    plan_.build(step.sequences, heads_, kv_.page_size, team_.threads, cascade_, split_);
    if (tiers_) hold();
    choosing_ = selection_.build(step.spans, heads_, kv_.page_size, sparsity_);
    if (!choosing_) return;
    chosen_.build(selection_.sequences(), heads_, kv_.page_size, team_.threads, cascade_, split_);
    if (!sparsity_.adaptive) unread_ += selection_.unread();  // what is adaptive counts in every layer
}

void Program::run(int first, int last) {
    const Alone alone(running_);
    fit(step.rows());
    const Work work = this->work(ahead_);
    int phases = 0;
    for (int i = first; i < last; i++) ops_[i]->prepare(work), phases += ops_[i]->phases();
    team_.reserve(phases);
    team_.run([&](Member& member) {
        for (int i = first; i < last; i++) ops_[i]->run(member, work);
    });
    if (tiers_) tiers_->check();
    if (choosing_) left_out_ += selection_.take_left_out();
}

std::vector<std::pair<std::string, double>> Program::profile(int first, int last) {
    std::vector<std::pair<std::string, double>> out;
    for (int i = first; i < last; i++) {
        const auto start = std::chrono::steady_clock::now();
        run(i, i + 1);
        const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
        out.emplace_back(ops_[i]->name(), took.count());
    }
    return out;
}

std::vector<int> Program::argmax(int slot) {
    const Alone alone(running_);
    const int n = (int)step.sampled.size();
    std::vector<int> out(n);
    team_.reserve(1);
    team_.run([&](Member& member) {
        member.share(n, [&](int r) {
            float best;
            int index;
            kernels_->argmax(rows(slot) + (size_t)r * stride(slot), slots_[slot].width, &best, &index);
            out[r] = std::isfinite(best) ? index : -1;
        });
    });
    return out;
}

std::vector<int> Program::choose(int slot, const std::vector<Choice>& choices) {
    const Slot& s = slots_.at(slot);
    const Logits logits{s.data.data(), (int)step.sampled.size(), s.width, s.stride};
    if (s.data.size() < step.sampled.size() * s.stride) throw std::invalid_argument("the slot does not hold these rows");
    return sampler_.choose(team_, logits, choices, step.changes);
}

}  // namespace dovetail
