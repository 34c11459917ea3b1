// Chooses tokens from rows of logits: changes to the logits, temperature, top-k, top-p, min-p.
//
// runtime/sampler.py is the definition, and gives the same bits. The odds of a token against the likeliest are defined
// operation by operation. They are multiples of a power of two so large that their sums are exact in float64, in any order.
#pragma once
#include <map>
#include <utility>
#include <vector>

#include "aligned.h"
#include "kernels.h"
#include "team.h"

namespace dovetail {

struct Choice {
    double temperature;  // 0: the largest logit
    int top_k;           // 0 or less: off
    double top_p, min_p;
    double noise;        // in [0, 1)
};

// Changes of a row's logits before a token is chosen, in this order.
struct Change {
    float repetition = 1, presence = 0, frequency = 0;
    std::vector<int32_t> tokens;  // those of the prompt, then those of the answer
    size_t prompt = 0;
    std::vector<std::pair<int32_t, float>> added;
    std::vector<uint32_t> allowed;  // token t is bit t % 32 of word t / 32; empty allows all
};

struct Logits {
    const float* data;
    int rows, width, stride;
};

// One thread's work on rows, and its memory.
class Chooser {
   public:
    explicit Chooser(const Kernels* kernels) : kernels_(kernels) {}
    // The token; -1 if the largest logit is not finite, or if a logit is NaN.
    int choose(const float* logits, int n, const Choice& how, const Change* change);

   private:
    struct Place {
        int token;
        double sum;  // of odds, up to and with it
    };
    const float* changed(const float* logits, const Change& change);
    int likeliest(float* best) const;
    int by_index(double noise);
    int in_order(const Choice& how);
    double take(int count);
    double take(double part);
    float bound(int wanted);
    void sink();
    void gather(float least);
    void gather_at(int depth);
    Place find(double mark);
    double sum_of(size_t first, size_t last);
    const float* logits_of(size_t first, size_t last);

    const Kernels* kernels_;
    const float* x_ = nullptr;
    int n_ = 0;
    Odds odds_{};
    Aligned<float> own_, maxima_, order_, logits_, odds_by_token_;
    Aligned<double> sums_, at_depth_;
    Aligned<int32_t> depths_;
    Aligned<uint64_t> keys_;
    size_t count_ = 0;   // of keys
    bool deep_ = false;  // many tokens may be chosen; the keys are those of one depth
    Aligned<int32_t> counts_;  // of each token; zero between rows
};

class Sampler {
   public:
    Sampler(const Kernels* kernels, int threads) : choosers_(threads, Chooser(kernels)) {}
    // A token for each row.
    std::vector<int> choose(Team& team, const Logits& logits, const std::vector<Choice>& choices,
                            const std::map<int, Change>& changes);

   private:
    std::vector<Chooser> choosers_;
};

}  // namespace dovetail
