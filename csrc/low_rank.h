// Keys of prompts as products of low rank. Pages are rebuilt from them: multiplied out and rotated at their positions.
#pragma once
#include <cstdint>
#include <unordered_map>
#include <vector>

#include "aligned.h"
#include "kv.h"

namespace dovetail {

// A prompt's keys of one layer: coefficients [tokens][rank] times a basis [rank][heads * dim], in the type of keys. They
// belong to the caller.
struct Factors {
    const uint8_t *coefficients, *basis;
    int rank;
};

// Frequencies [dim / 2], and the factor on cosines and sines.
struct Rotation {
    std::vector<float> frequencies;
    float temper;
};

struct KeysShape {
    KVMemory kv;  // how K is stored, without its memory
    std::vector<Rotation> rotations;
    std::vector<int> of_layer;  // the number of each layer's rotation
};

// A page of a layer, by its alias.
struct AliasPlace {
    int64_t layer, alias;
    int head;
};

class LowRankKeys {
 public:
    explicit LowRankKeys(KeysShape shape);

    // The prompt whose pages have these aliases, in order, and its factors by layer (rank 0 where there are none).
    void add(const std::vector<int64_t>& aliases, const std::vector<Factors>& layers);
    void remove(const std::vector<int64_t>& aliases);
    // K of a page as tiles, in codes where K is stored so.
    void rebuild(const Kernels& kernels, const AliasPlace& at, uint8_t* out) const;

 private:
    struct Layer {
        const uint8_t* coefficients;
        int rank;
        Aligned<uint8_t> basis;  // [heads][rank, in pairs][dim padded] as the kernel reads it
    };
    struct Page {
        int64_t prompt = -1;
        int index = 0;
    };
    int padded() const { return shape_.kv.padded(); }
    size_t element() const { return (size_t)shape_.kv.element(); }
    size_t head_basis(int rank) const { return (size_t)((rank + 1) / 2 * 2) * padded() * element(); }
    void pack(const Factors& from, Layer& to) const;
    int half() const { return (shape_.kv.dim / 2 + 15) / 16 * 16; }
    void angles_at(const Rotation& rotation, int position, double factor, float* out) const;
    void extend(int tiles);

    const KeysShape shape_;
    int64_t next_ = 0;
    std::unordered_map<int64_t, std::vector<Layer>> prompts_;
    std::vector<Page> pages_;  // by alias
    struct Table {  // of a rotation, see Angles: at_tiles for every sixteenth position
        std::vector<float> frequencies, at_tiles, beyond;
    };
    std::vector<Table> tables_;
};

}  // namespace dovetail
