// A linear operation: activation rows, packed weights, and what is done with the product.
#pragma once
#include "program.h"

namespace dovetail {

class LinearOp : public Op {
   public:
    // With so many bytes of activation rows, weights must be fetched ahead: the processor no longer sees their stream.
    static constexpr size_t CROWDED = 8 << 10;

    LinearOp(LinearArgs args, const Slot& in, const Slot& out, const Kernels& kernels);
    const char* name() const override { return args_.gate ? "linear_gate" : args_.add ? "linear_add" : "linear"; }
    void prepare(const Work& work) override;
    void run(Member& member, const Work& work) override;
    size_t weight_bytes() const override;

   private:
    struct Segment {
        const Packed* weights;
        int column, first_tile;
    };
    // `count` tiles from `tile` on times n activation rows, which are group `part` of `parts` groups of rows. ahead: fetch
    // weights ahead.
    struct Block {
        int tile, count;
        const uint8_t* rows;
        int n, part, parts;
        bool ahead;
    };
    struct Target {
        float* out;
        int stride;
        bool add;
    };
    // Row r of the operation's rows, at x. own: room for two rows of floats.
    void activate(const Work& work, int r, const float* x, uint8_t* row, float* own) const;
    size_t floats() const { return (size_t)k_blocks_ * BLOCK; }
    void panel(const Work& work, const uint8_t* rows, int row, int n, int first, int last) const;
    void tiles(const Work& work, const uint8_t* rows, int row, int n, int first, int last) const;
    void gates(const Work& work, const uint8_t* rows, int row, int n, int first, int last) const;
    void multiply(const Kernels& kernels, const Packed& w, const Block& block, const Target& to) const;
    void finish(Slot& out, int row, int column, int n, const float* values) const;
    int total(const Work& work) const;
    // The register block for n rows of a weight.
    BlockShape shape(const Kernels& kernels, const Packed& w, int n) const {
        return n <= kernels.rows_alone ? BlockShape{kernels.rows_alone, 1} : kernels.many[w.format][args_.activation];
    }
    BlockShape shape(const Kernels& kernels, int n) const;  // the fewest rows and the most tiles of all weights' blocks
    bool ahead(const Work& work, int n) const {
        return work.ahead || n > work.kernels->rows_alone || n * row_bytes_ > CROWDED;
    }

    LinearArgs args_;
    std::vector<Segment> segments_;
    int tiles_ = 0, k_blocks_, in_width_;
    size_t row_bytes_;
    const void* const* shared_ = nullptr;  // by all weights
};

}  // namespace dovetail
