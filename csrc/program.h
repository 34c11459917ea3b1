// A model's layers as a list of operations on row buffers ("slots"), recorded once and replayed by one call.
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "aligned.h"
#include "attention.h"
#include "pack.h"
#include "sample.h"
#include "select.h"
#include "tiers.h"

namespace dovetail {

// Rows of floats, [rows][stride]. What lies beyond `width` is zero, at least up to the next multiple of 32. The stride is
// an odd number of cache lines: rows whose distance is a power of two would share a few sets of the cache.
struct Slot {
    int width, stride;
    bool sampled;  // holds only the rows to sample from
    Aligned<float> data;
};

// The rows of a step.
struct Step {
    std::vector<int32_t> tokens, positions, span_of_row, offsets, sampled;  // offset: of the token in its page
    std::vector<int64_t> pages;                                            // of each row's token
    std::vector<int32_t> tables;                                           // page lists, one after the other
    std::vector<Sequence> sequences;
    std::vector<Span> spans;                                               // the sequences, as rows that may choose
    std::vector<size_t> table_start;
    std::vector<int32_t> aliases;  // of each sequence, one after the other
    std::vector<size_t> alias_start;
    std::map<int, Change> changes;  // to logits, by sampled row

    int rows() const { return (int)tokens.size(); }
    void clear();
};

struct Work {
    Step* step;
    AttentionPlan* plan;
    AttentionPlan* chosen;  // where rows read the pages that `selection` chose; or null: none has to choose
    Selection* selection;
    const Kernels* kernels;
    std::vector<Slot>* slots;
    Aligned<uint8_t>* rows;  // activation rows of the operation at work; every operation ends before the next begins
    std::vector<Aligned<uint8_t>>* own;  // memory of each thread for the operation at work
    Tiers* tiers;  // or null: all pages are on the device
    bool ahead;  // fetch weights ahead also where the processor may do that as well by itself
};

class Op {
   public:
    virtual ~Op() = default;
    virtual const char* name() const = 0;
    virtual int phases() const { return 4; }
    virtual void prepare(const Work&) {}  // on one thread, before the region: all memory is taken here
    virtual void run(Member& member, const Work& work) = 0;
    virtual size_t weight_bytes() const { return 0; }
};

struct LinearArgs {
    int in, out;
    std::vector<std::shared_ptr<Packed>> weights;  // columns of all of them, one after the other
    Activation activation;
    std::vector<float> norm;  // empty for none
    float eps;
    std::vector<float> bias;  // empty for none
    bool add;                 // out += instead of out =
    Gate gate;                // two weights: out = act(first) * second
    bool sampled;             // only rows to sample from
};

struct RopeArgs {
    int in, angles, q;  // q: slot of rotated queries in the KV's compute type
    int layer;
    std::vector<float> q_norm, k_norm;  // empty for none
    float eps;
};

// basis: [KV heads][head_dim][width], floats that belong to the caller, as in TurnedKeys; width is even.
struct TurnArgs {
    int in, angles, out;
    std::vector<float> q_norm;  // empty for none
    float eps;
    const float* basis;
    int width;
};

// Partial keys of all layers from `first` on: [layers][pages][KV heads][tiles], and the basis of each layer.
struct TurnedKeys {
    int first, layers;
    const float* basis;
    int width;
    uint8_t* out;
};

struct AttendOn {
    int q, out, layer;
    bool chosen;
};

class Program {
   public:
    Program(const std::string& isa, int threads, Heads heads, bool cascade, bool split);

    Program(const Program&) = delete;
    Program& operator=(const Program&) = delete;

    int slot(int width, bool sampled);
    void set_kv(const KVMemory& kv) { kv_ = kv; }
    int page_size() const { return kv_.page_size; }
    int mark() const { return (int)ops_.size(); }

    void embed(int out, Format format, const uint8_t* rows, size_t row_bytes, int width, float scale);
    void angles(int out, std::vector<float> frequencies, float temper);
    void linear(LinearArgs args);
    void rope(RopeArgs args);
    // Rows read everything, or what the last `pick` of the layer chose.
    void attend(AttendOn on, int window, Variant variant, std::vector<float> params);
    void sparsify(const Sparsity& sparsity) { sparsity_ = sparsity; }
    // Pages do not all lie on the device: `fetch` sees to it that those do which `attend` reads next.
    void set_tiers(std::shared_ptr<Tiers> tiers) { tiers_ = std::move(tiers), kv_.places = tiers_->places(); }
    void fetch(int layer, int window, bool chosen, bool guessed);
    void fetch_ahead(int layer);
    // What layers read that is guessed: queries [query heads][width] of `out` from the projected ones of `in`, turned.
    void turn(TurnArgs args);
    void pick_partial(int q, int layer, const uint8_t* keys, int width, float alpha);
    void seal_partial(const TurnedKeys& to, const std::vector<int64_t>& pages);
    void pick(int q, int layer, Summary kind, int vectors, const uint8_t* summaries);
    void summarise(Summary kind, int layers, const std::vector<int64_t>& pages, uint8_t* out, int vectors);
    int64_t unread() const { return unread_ + left_out_; }  // pages of a head that rows left out, in all steps

    Step step;

    // Learns from the recorded weights how this processor reads them fastest. No result depends on it.
    void tune();
    void plan();
    // Operations [first, last) on the step's rows.
    void run(int first, int last);
    std::vector<int> argmax(int slot);  // of each sampled row; -1 where the best is not finite
    std::vector<int> choose(int slot, const std::vector<Choice>& choices);
    float* rows(int slot) { return slots_[slot].data.data(); }
    int stride(int slot) const { return slots_[slot].stride; }
    const Kernels& kernels() const { return *kernels_; }
    const AttentionPlan& attention() const { return plan_; }
    std::vector<std::pair<std::string, double>> profile(int first, int last);

   private:
    void fit(int rows);
    void hold();
    Work work(bool ahead) { return {&step, &plan_, choosing_ ? &chosen_ : nullptr, &selection_, kernels_, &slots_, &rows_, &own_, tiers_.get(), ahead}; }
    void add(Op* op) { ops_.emplace_back(op); }

    const Kernels* kernels_;
    Team team_;
    Heads heads_;
    bool cascade_, split_;
    KVMemory kv_{};
    std::shared_ptr<Tiers> tiers_;
    int layers_ = 0;  // that fetch
    std::vector<Slot> slots_;
    Aligned<uint8_t> rows_;
    std::vector<Aligned<uint8_t>> own_;
    std::atomic<bool> running_{false};
    bool ahead_ = true;
    std::vector<std::unique_ptr<Op>> ops_;
    AttentionPlan plan_, chosen_;
    Selection selection_;
    Sparsity sparsity_{INT32_MAX, INT32_MAX, -1, false, false};
    bool choosing_ = false;
    int64_t unread_ = 0, left_out_ = 0;
    Sampler sampler_;
};

}  // namespace dovetail
