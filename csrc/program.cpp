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
    tokens.clear(), positions.clear(), offsets.clear(), sampled.clear(), pages.clear();
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

// cos and sin of each row's position, [frequencies] each. The second half of a row of the slot is sin.
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

// out += norm(in).
class NormAddOp : public Op {
   public:
    NormAddOp(int in, int out, std::vector<float> norm, float eps) : in_(in), out_(out), norm_(std::move(norm)), eps_(eps) {}
    const char* name() const override { return "norm_add"; }
    void prepare(const Work& work) override {
        for (auto& own : *work.own)
            if (own.size() < norm_.size() * 4) own.resize(norm_.size() * 4);
    }
    void run(Member& member, const Work& work) override {
        const int n = (int)norm_.size();
        float* normed = (float*)(*work.own)[member.id].data();
        member.share(work.step->rows(), [&](int r) {
            work.kernels->rms_norm(row(work, in_, r), norm_.data(), eps_, n, normed);
            float* to = row(work, out_, r);
            for (int i = 0; i < n; i++) to[i] += normed[i];
        });
    }

   private:
    int in_, out_;
    std::vector<float> norm_;
    float eps_;
};

// Norms of heads if the model has them, rotation of q and k, the write of k and v, and q in the compute type.
class RopeOp : public Op {
   public:
    RopeOp(RopeArgs args, const Shape& shape) : args_(std::move(args)), heads_(shape.heads), kv_(shape.kv) {
        const int padded = kv_.padded();
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
        const bool turns = args_.angles >= 0;
        const float *x = row(work, args_.in, r), *cos = turns ? row(work, args_.angles, r) : nullptr;
        alignas(64) float head[512], turned[512];
        memset(head, 0, padded * 4), memset(turned, 0, padded * 4);
        auto turn = [&](const float* from, const std::vector<float>& norm, float by) {
            if (!norm.empty()) {
                memcpy(head, from, dim * 4);
                k.rms_norm(head, norm.data(), args_.eps, dim, head);
                from = head;
            }
            if (turns) return k.rotate(from, cos, cos + dim / 2, by, dim, turned);
            for (int i = 0; i < dim; i++) turned[i] = from[i] * by;
        };
        turn(x + (heads_.query + h) * dim, args_.k_norm, 1.0f);
        const float* v = x + (heads_.query + heads_.kv + h) * dim;
        const int64_t page = work.step->pages[r] + args_.layer * kv_.pages_per_layer;
        write_token(k, kv_, {page, h, work.step->offsets[r]}, turned, v);
        for (int g = 0; g < group; g++) {
            turn(x + (h * group + g) * dim, args_.q_norm, args_.scale);
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
    AttendOp(AttendOn on, int window, Variant variant, std::vector<float> params, Shape& shape, Choosing* chosen)
        : on_(on), window_(window), variant_(variant), params_(std::move(params)), kv_(shape.kv), shape_(shape),
          chosen_(chosen) {}
    const char* name() const override { return "attend"; }
    void prepare(const Work&) override { plan().prepare(kv_); }
    void run(Member& member, const Work& work) override {
        Slot& out = (*work.slots)[on_.out];
        AttendArgs args{&kv_, on_.layer * kv_.pages_per_layer, (*work.slots)[on_.q].data.data(), out.data.data(),
                        out.stride, window_, variant_, params_.data(), nullptr};
        plan().run(member, *work.kernels, args);
    }

   private:
    AttentionPlan& plan() const { return chosen_ && chosen_->active ? chosen_->plan : shape_.plan; }

    AttendOn on_;
    int window_;
    Variant variant_;
    std::vector<float> params_;
    const KVMemory& kv_;
    Shape& shape_;
    Choosing* chosen_;  // or null
};

// Chooses the pages of a layer, where rows have to.
class PickOp : public Op {
   public:
    PickOp(Choosing& chosen, int q, int layer, Summary kind, int vectors, const uint8_t* summaries)
        : chosen_(chosen), q_(q), layer_(layer), kind_(kind), vectors_(vectors), summaries_(summaries),
          kv_(chosen.shape->kv) {}
    const char* name() const override { return "pick"; }
    void prepare(const Work& work) override {
        if (chosen_.active) chosen_.selection.prepare(args(work), (int)work.own->size());
    }
    void run(Member& member, const Work& work) override {
        if (chosen_.active) chosen_.selection.pick(member, *work.kernels, args(work));
    }

   private:
    PickArgs args(const Work& work) const {
        const int64_t first = layer_ * kv_.pages_per_layer;
        const int width = kind_ == LANDMARKS ? (kv_.dim + 31) / 32 * 32 : kv_.padded();
        const size_t bytes = (size_t)kv_.heads * vectors_ * width * kv_.element();
        const uint8_t* summaries = summaries_ ? summaries_ + first * bytes : nullptr;
        return {&kv_, (*work.slots)[q_].data.data(), summaries, kind_, vectors_, first, work.tiers};
    }

    Choosing& chosen_;
    int q_, layer_;
    Summary kind_;
    int vectors_;
    const uint8_t* summaries_;
    const KVMemory& kv_;
};

// Brings the pages that a layer reads to the device: all pages of the step, or the picked ones.
class FetchOp : public Op {
   public:
    // ahead: begin to bring the pages that the next layer will read by the guess.
    FetchOp(FetchOn on, bool ahead, const Shape& shape, Choosing* chosen)
        : on_(on), ahead_(ahead), kv_(shape.kv), chosen_(chosen) {}
    const char* name() const override { return ahead_ ? "fetch_ahead" : "fetch"; }
    void prepare(const Work&) override { found_.resize(kv_.heads); }
    void run(Member& member, const Work& work) override {
        if (ahead_ && !chosen_->active) return;
        Tiers& tiers = *work.tiers;
        member.share(kv_.heads, [&](int h) { want(work, h); });
        member.share(1, [&](int) {
            misses_.clear();
            for (const auto& f : found_) misses_.insert(misses_.end(), f.begin(), f.end());
            tiers.begin(misses_);
        });
        // A thread may come here late, so what it reads does not change until the whole program has run.
        const int n = (int)misses_.size();
        if (n && (tiers.addressed() || tiers.rebuilds()))
            member.share(n, [&](int i) {
                if (tiers.addressed()) tiers.copy(misses_[i]);
                tiers.rebuild(misses_[i], *work.kernels);
            });
        if (!ahead_ && (n || on_.guessed) && tiers.waits()) member.share(1, [&](int) { tiers.arrive(); });
    }

   private:
    void want(const Work& work, int head) {
        std::vector<Tiers::Miss>& misses = found_[head];
        misses.clear();
        if (!ahead_) work.tiers->next(head);
        const int64_t first = on_.layer * kv_.pages_per_layer;
        const bool chosen = chosen_ && chosen_->active;
        for (const Sequence& s : chosen ? chosen_->selection.sequences() : work.step->sequences) {
            if (!s.rows || (ahead_ && s.lists == 1 && !s.cut)) continue;  // nobody reads it, or without a guess
            const int32_t* list = s.pages + (s.lists == 1 ? 0 : (size_t)head * s.num_pages);
            const int skip = on_.window && !s.page_positions ? std::max(0, s.start - on_.window + 1) / kv_.page_size : 0;
            const int count = s.num_pages - (s.cut ? *s.cut / kv_.page_size : 0) - skip;
            work.tiers->want(head, list + skip, count, {first, ahead_, ahead_}, misses);
        }
    }

    const FetchOn on_;
    const bool ahead_;
    const KVMemory& kv_;
    Choosing* chosen_;  // or null
    std::vector<std::vector<Tiers::Miss>> found_;  // by each head
    std::vector<Tiers::Miss> misses_;
};

// Partial queries: projected, rotated and turned.
class TurnOp : public Op {
   public:
    TurnOp(TurnArgs args, const Shape& shape) : args_(std::move(args)), heads_(shape.heads), kv_(shape.kv) {}
    const char* name() const override { return "turn"; }
    void run(Member& member, const Work& work) override {
        if (!work.choosing) return;
        member.share(work.step->rows() * heads_.kv, [&](int i) { one(work, i / heads_.kv, i % heads_.kv); });
    }

   private:
    void one(const Work& work, int r, int h) const {
        const Kernels& k = *work.kernels;
        const int dim = heads_.dim, group = heads_.group(), width = args_.width;
        const bool turns = args_.angles >= 0;
        const float *x = row(work, args_.in, r), *cos = turns ? row(work, args_.angles, r) : nullptr;
        alignas(64) float normed[512], turned[512];
        uint8_t* out = (uint8_t*)row(work, args_.out, r);
        for (int g = h * group; g < (h + 1) * group; g++) {
            const float* q = x + g * dim;
            if (!args_.q_norm.empty()) {
                memcpy(normed, q, dim * 4);
                k.rms_norm(normed, args_.q_norm.data(), args_.eps, dim, normed);
                q = normed;
            }
            if (turns) k.rotate(q, cos, cos + dim / 2, args_.scale, dim, turned);
            else for (int i = 0; i < dim; i++) turned[i] = q[i] * args_.scale;
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
    PickPartialOp(Choosing& chosen, int q, int layer, const uint8_t* keys, int width, float alpha)
        : chosen_(chosen), q_(q), layer_(layer), keys_(keys), width_(width), alpha_(alpha), kv_(chosen.shape->kv) {}
    const char* name() const override { return "pick_partial"; }
    void prepare(const Work& work) override {
        if (chosen_.active) chosen_.selection.prepare_partial((int)work.own->size());
    }
    void run(Member& member, const Work& work) override {
        if (chosen_.active) chosen_.selection.pick_partial(member, *work.kernels, args(work));
    }

   private:
    PartialArgs args(const Work& work) const {
        const Slot& q = (*work.slots)[q_];
        const size_t page = (size_t)kv_.heads * kv_.page_size * width_ * kv_.element();
        return {&kv_, q.data.data(), q.stride, keys_ + layer_ * kv_.pages_per_layer * page, width_, alpha_};
    }

    Choosing& chosen_;
    int q_, layer_;
    const uint8_t* keys_;
    int width_;
    float alpha_;
    const KVMemory& kv_;
};

}  // namespace

namespace {

// Marks a program as running. A second thread then gets an error and does not change what the first one reads.
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

Program::Program(const std::string& isa, int threads, bool cascade, bool split)
    : kernels_(isa.empty() ? best_kernels() : dovetail::kernels(isa.c_str())), team_(threads), cascade_(cascade),
      split_(split), sampler_(kernels_, threads) {
    if (!kernels_) throw std::invalid_argument("this build or this CPU has no '" + isa + "'");
    own_.resize(threads);
}

int Program::shape(const Heads& heads, const KVMemory& kv) {
    if (heads.kv != kv.heads || heads.dim != kv.dim || heads.query % heads.kv)
        throw std::invalid_argument("a shape's heads do not fit its KV");
    if (!shapes_.empty() && kv.page_size != page_size()) throw std::invalid_argument("all shapes have one page size");
    shapes_.push_back(std::make_unique<Shape>(Shape{heads, kv, {}}));
    return (int)shapes_.size() - 1;
}

int Program::choosing(int shape, const Sparsity& sparsity) {
    auto same = [&](const Choosing& c) {
        const Sparsity& s = c.sparsity;
        return c.shape == &at(shape) && s.window == sparsity.window && s.budget == sparsity.budget &&
               s.leading == sparsity.leading && s.adaptive == sparsity.adaptive;
    };
    for (size_t i = 0; i < choosings_.size(); i++)
        if (same(*choosings_[i])) return (int)i;
    choosings_.push_back(std::make_unique<Choosing>());
    choosings_.back()->shape = &at(shape), choosings_.back()->sparsity = sparsity;
    return (int)choosings_.size() - 1;
}

void Program::set_tiers(std::shared_ptr<Tiers> tiers) {
    if (shapes_.size() != 1) throw std::invalid_argument("a slow tier holds KV of one shape");
    tiers_ = std::move(tiers), shapes_[0]->kv.places = tiers_->places();
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

void Program::norm_add(int in, int out, std::vector<float> norm, float eps) {
    const size_t width = norm.size();
    if ((int)width > slots_.at(in).width || (int)width > slots_.at(out).width)
        throw std::invalid_argument("a norm is wider than its slots");
    add(new NormAddOp(in, out, std::move(norm), eps));
}

void Program::rope(RopeArgs args) {
    const Shape& shape = at(args.shape);
    add(new RopeOp(std::move(args), shape));
}

void Program::attend(AttendOn on, int window, Variant variant, std::vector<float> params) {
    Choosing* by = chosen(on.chosen);
    if (by && (window || variant)) by->sparsity.positions = true;  // both ask where the chosen pages lie
    add(new AttendOp(on, window, variant, std::move(params), at(on.shape), by));
}

void Program::pick(int chosen, int q, int layer, Summary kind, int vectors, const uint8_t* summaries) {
    add(new PickOp(*choosings_.at(chosen), q, layer, kind, vectors, summaries));
}

void Program::summarise(Summary kind, int layers, const std::vector<int64_t>& pages, uint8_t* out, int vectors) {
    const Alone alone(running_);
    const KVMemory& kv = at(0).kv;
    team_.reserve(1);
    if (!tiers_) {
        team_.run([&](Member& member) { dovetail::summarise(member, *kernels_, kv, kind, layers, pages, out, vectors); });
        return;
    }
    for (int layer = 0; layer < layers; layer++) {  // what one layer needs fits on the device, all of them may not
        tiers_->bring(layer, pages, false);
        std::vector<int64_t> of_layer(pages);
        for (int64_t& p : of_layer) p += layer * kv.pages_per_layer;
        team_.run([&](Member& member) { dovetail::summarise(member, *kernels_, kv, kind, 1, of_layer, out, vectors); });
    }
}

void Program::fetch(FetchOn on) {
    add(new FetchOp(on, false, at(on.shape), chosen(on.chosen)));
    layers_ = std::max(layers_, on.layer + 1);
}

void Program::fetch_ahead(int layer, int chosen) {
    Choosing& by = *choosings_.at(chosen);
    add(new FetchOp({layer, 0, 0, chosen, false}, true, *by.shape, &by));
}

void Program::turn(TurnArgs args) {
    const Shape& shape = at(args.shape);
    add(new TurnOp(std::move(args), shape));
}

void Program::pick_partial(int chosen, int q, int layer, const uint8_t* keys, int width, float alpha) {
    add(new PickPartialOp(*choosings_.at(chosen), q, layer, keys, width, alpha));
}

void Program::seal_partial(const TurnedKeys& to, const std::vector<int64_t>& pages) {
    const Alone alone(running_);
    team_.reserve(1);
    const KVMemory& kv = at(0).kv;
    const int heads = kv.heads, per_page = kv.page_size / 16, n = (int)pages.size();
    const size_t tile = (size_t)16 * to.width * kv.element();
    for (int layer = to.first; layer < to.layers; layer++) {
        if (tiers_) tiers_->bring(layer, pages, false);
        const int64_t first = layer * kv.pages_per_layer;
        team_.run([&](Member& member) {
            member.share(n * heads, [&](int i) {
                const int64_t page = pages[i / heads] + first;
                const float* basis = to.basis + ((size_t)layer * heads + i % heads) * kv.dim * to.width;
                uint8_t* out = to.out + ((size_t)page * heads + i % heads) * per_page * tile;
                thread_local std::vector<uint8_t> room;
                const uint8_t* keys = page_keys(*kernels_, kv, page, i % heads, room);
                for (int t = 0; t < per_page; t++)
                    kernels_->turn_keys[kv.compute()](keys + t * kv.tile_bytes(), kv.dim, basis, to.width, out + t * tile);
            });
        });
    }
}

// Keeps room for what the step writes until the step ends.
void Program::hold() {
    const KVMemory& kv = at(0).kv;
    tiers_->step();
    std::vector<int32_t> pages(step.pages.begin(), step.pages.end());
    std::sort(pages.begin(), pages.end());
    pages.erase(std::unique(pages.begin(), pages.end()), pages.end());
    std::vector<Tiers::Miss> misses;
    for (int h = 0; h < kv.heads; h++) {
        tiers_->next(h);
        for (int layer = 0; layer < layers_; layer++) {
            const int64_t first = layer * kv.pages_per_layer;
            tiers_->want(h, pages.data(), (int)pages.size(), {first, layers_ + 1, false}, misses);
        }
    }
    tiers_->fetch(misses);
    for (int h = 0; h < kv.heads; h++)
        for (int layer = 0; layer < layers_; layer++)
            for (int32_t p : pages) tiers_->touch(h, layer * kv.pages_per_layer + p);
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
    left_.clear();
    lay();
    if (tiers_) hold();
    for (auto& c : choosings_)
        if (c->active && !c->sparsity.adaptive) unread_ += c->selection.unread();  // what is adaptive counts in every layer
}

void Program::lay() {
    for (size_t i = 0; i < step.sequences.size(); i++) {
        Span& span = step.spans[i];
        Sequence& sequence = step.sequences[i];
        span.pages = sequence.pages = step.tables.data() + step.table_start[i];
        span.positions = sequence.positions = step.positions.data() + sequence.row;
        span.aliases = step.aliases.data() + step.alias_start[i];
    }
    for (auto& s : shapes_) s->plan.build(step.sequences, s->heads, s->kv.page_size, team_.threads, cascade_, split_);
    active_ = false;
    for (auto& c : choosings_) {
        const Shape& s = *c->shape;
        c->active = c->selection.build(step.spans, s.heads, s.kv.page_size, c->sparsity);
        if (c->active) c->plan.build(c->selection.sequences(), s.heads, s.kv.page_size, team_.threads, cascade_, split_);
        active_ |= c->active;
    }
}

namespace {

template <class T> std::vector<T> some_of(const std::vector<T>& all, const std::vector<int>& rows) {
    std::vector<T> out;
    out.reserve(rows.size());
    for (int r : rows) out.push_back(all[r]);
    return out;
}

// The step with only these rows. Rows to sample from do not change, because their logits come after `restore`.
Step part_of(const Step& all, const std::vector<int>& rows) {
    Step s;
    s.tokens = some_of(all.tokens, rows), s.positions = some_of(all.positions, rows);
    s.offsets = some_of(all.offsets, rows), s.pages = some_of(all.pages, rows);
    s.tables = all.tables, s.table_start = all.table_start, s.aliases = all.aliases, s.alias_start = all.alias_start;
    s.sequences = all.sequences, s.spans = all.spans;
    size_t at = 0;
    for (size_t i = 0; i < s.sequences.size(); i++) {
        Sequence& q = s.sequences[i];
        const int end = q.row + q.rows, first = (int)at;
        while (at < rows.size() && rows[at] < end) at++;
        q.row = s.spans[i].row = first, q.rows = s.spans[i].rows = (int)at - first;
        q.start = q.rows ? s.positions[first] : 0;
    }
    return s;
}

}  // namespace

void Program::keep(std::vector<int> rows, std::vector<int> slots) {
    const Alone alone(running_);
    if (slots.empty()) throw std::invalid_argument("at least one slot holds what later operations read");
    for (size_t i = 0; i < rows.size(); i++)
        if (rows[i] < 0 || rows[i] >= step.rows() || (i && rows[i] <= rows[i - 1]))
            throw std::invalid_argument("rows to keep must ascend and lie in the step");
    Left left{std::move(step), std::move(rows), slots[0], {}};
    Slot& hidden = slots_.at(left.slot);
    left.data.assign(hidden.data.data(), hidden.data.data() + (size_t)left.step.rows() * hidden.stride);
    for (int number : slots) {
        Slot& s = slots_.at(number);
        for (size_t i = 0; i < left.rows.size(); i++)  // rows only move up, so none is overwritten before it has moved
            memmove(s.data.data() + i * s.stride, s.data.data() + (size_t)left.rows[i] * s.stride, (size_t)s.stride * 4);
    }
    step = part_of(left.step, left.rows);
    left_.push_back(std::move(left));
    lay();
}

void Program::restore() {
    const Alone alone(running_);
    if (left_.empty()) return;
    while (!left_.empty()) {
        Left& left = left_.back();
        Slot& s = slots_.at(left.slot);
        for (size_t i = 0; i < left.rows.size(); i++)
            memcpy(left.data.data() + (size_t)left.rows[i] * s.stride, s.data.data() + i * s.stride, (size_t)s.stride * 4);
        memcpy(s.data.data(), left.data.data(), left.data.size() * 4);
        step = std::move(left.step);
        left_.pop_back();
    }
    lay();  // plans point into the step
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
    for (auto& c : choosings_)
        if (c->active) left_out_ += c->selection.take_left_out();
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
