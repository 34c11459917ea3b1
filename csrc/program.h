// A model's layers as a list of operations on row buffers ("slots"), recorded once and replayed by one call.
#pragma once
#include <atomic>
#include <cstdint>
#include <map>
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

// Rows of floats, [rows][stride]. Beyond `width` they are zero, at least up to the next multiple of 32. The stride is an odd
// number of cache lines, because rows at a distance of a power of two would share few sets of the cache.
struct Slot {
    int width, stride;
    bool sampled;  // holds only the rows to sample from
    Aligned<float> data;
};

// The rows of a step.
struct Step {
    std::vector<int32_t> tokens, positions, offsets, sampled;              // offset: of the token in its page
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

// Heads, and the KV that they read and write. Layers that have both in common use one shape, and a step's attention is
// planned once for all of them.
struct Shape {
    Heads heads;
    KVMemory kv;
    AttentionPlan plan;
};

// Layers of a shape whose rows may leave pages unread by one rule. active: a row of the step has to choose; then `plan` is
// over what `selection` chose.
struct Choosing {
    Shape* shape;
    Sparsity sparsity;
    Selection selection;
    AttentionPlan plan;
    bool active = false;
};

struct Work {
    Step* step;
    bool choosing;  // whether any row has to choose
    const Kernels* kernels;
    std::vector<Slot>* slots;
    Aligned<uint8_t>* rows;  // activation rows of the running operation; each ends before the next begins
    std::vector<Aligned<uint8_t>>* own;  // memory of each thread for the running operation
    Tiers* tiers;  // or null: all pages are on the device
    bool ahead;  // fetch weights ahead, even if the processor may do that by itself
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
    int in, angles, q;  // q: slot of rotated queries in the KV's compute type; angles: -1 for no rotation
    int layer, shape;
    float scale;                        // of queries
    std::vector<float> q_norm, k_norm;  // empty for none
    float eps;
};

// basis: [KV heads][head_dim][width], floats that belong to the caller, as in TurnedKeys; width is even.
struct TurnArgs {
    int in, angles, out, shape;
    float scale;
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

// chosen: which `Choosing` says what rows read, or -1: they read everything.
struct AttendOn {
    int q, out, layer, shape, chosen;
};

struct FetchOn {
    int layer, shape, window, chosen;
    bool guessed;
};

class Program {
   public:
    Program(const std::string& isa, int threads, bool cascade, bool split);

    Program(const Program&) = delete;
    Program& operator=(const Program&) = delete;

    int slot(int width, bool sampled);
    // The number of a shape; the first one has number 0. All have the same page size.
    int shape(const Heads& heads, const KVMemory& kv);
    // The number of layers of a shape that choose by this rule.
    int choosing(int shape, const Sparsity& sparsity);
    int page_size() const { return shapes_.empty() ? 1 : shapes_[0]->kv.page_size; }
    int mark() const { return (int)ops_.size(); }

    void embed(int out, Format format, const uint8_t* rows, size_t row_bytes, int width, float scale);
    void angles(int out, std::vector<float> frequencies, float temper);
    void linear(LinearArgs args);
    // out += norm(in), row by row.
    void norm_add(int in, int out, std::vector<float> norm, float eps);
    void rope(RopeArgs args);
    // Rows read everything, or what the last `pick` of the layer chose.
    void attend(AttendOn on, int window, Variant variant, std::vector<float> params);
    // Not all pages are on the device. `fetch` brings those that `attend` reads next. For one shape only.
    void set_tiers(std::shared_ptr<Tiers> tiers);
    void fetch(FetchOn on);
    void fetch_ahead(int layer, int chosen);
    // Partial queries for guesses: `out` [query heads][width] are the projected queries of `in`, rotated and turned.
    void turn(TurnArgs args);
    void pick_partial(int chosen, int q, int layer, const uint8_t* keys, int width, float alpha);
    void seal_partial(const TurnedKeys& to, const std::vector<int64_t>& pages);
    void pick(int chosen, int q, int layer, Summary kind, int vectors, const uint8_t* summaries);
    void summarise(Summary kind, int layers, const std::vector<int64_t>& pages, uint8_t* out, int vectors);
    int64_t unread() const { return unread_ + left_out_; }  // pages of a head that rows left out, in all steps

    Step step;

    // Measures on the recorded weights how this processor reads them fastest. No result depends on it.
    void tune();
    void plan();
    // Go on with only these rows of the step, in ascending order; `slots` hold rows that later operations read. `restore`
    // ends that: what `slots[0]` holds of the rows is put back among the others, which keep what they had.
    void keep(std::vector<int> rows, std::vector<int> slots);
    void restore();
    // Operations [first, last) on the step's rows.
    void run(int first, int last);
    std::vector<int> argmax(int slot);  // of each sampled row; -1 where the best is not finite
    std::vector<int> choose(int slot, const std::vector<Choice>& choices);
    float* rows(int slot) { return slots_[slot].data.data(); }
    int stride(int slot) const { return slots_[slot].stride; }
    const Kernels& kernels() const { return *kernels_; }
    const AttentionPlan& attention() const { return shapes_.at(0)->plan; }
    std::vector<std::pair<std::string, double>> profile(int first, int last);

   private:
    void fit(int rows);
    void hold();
    void lay();  // out what the step's rows read
    Work work(bool ahead) { return {&step, active_, kernels_, &slots_, &rows_, &own_, tiers_.get(), ahead}; }
    Shape& at(int shape) { return *shapes_.at(shape); }
    Choosing* chosen(int number) { return number < 0 ? nullptr : choosings_.at(number).get(); }

    // Rows that were left behind, and where the others go back to.
    struct Left {
        Step step;
        std::vector<int> rows;
        int slot;
        std::vector<float> data;
    };
    void add(Op* op) { ops_.emplace_back(op); }

    const Kernels* kernels_;
    Team team_;
    bool cascade_, split_;
    std::vector<std::unique_ptr<Shape>> shapes_;
    std::vector<std::unique_ptr<Choosing>> choosings_;
    std::vector<Left> left_;
    std::shared_ptr<Tiers> tiers_;
    int layers_ = 0;  // that fetch
    std::vector<Slot> slots_;
    Aligned<uint8_t> rows_;
    std::vector<Aligned<uint8_t>> own_;
    std::atomic<bool> running_{false};
    bool ahead_ = true;
    std::vector<std::unique_ptr<Op>> ops_;
    bool active_ = false;  // some row of the step has to choose
    int64_t unread_ = 0, left_out_ = 0;
    Sampler sampler_;
};

}  // namespace dovetail
