#include "sample.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <numeric>
#include <stdexcept>

namespace dovetail {

namespace {

constexpr size_t SORTED = 128;  // keys that are sorted rather than halved again
constexpr int GUESS = 128;      // how many tokens top-p is first guessed to leave
constexpr int DEPTHS = 2048;

int blocks(int n) { return (n + LOGITS - 1) / LOGITS; }

template <class T> void grow(T& v, size_t n) {
    if (v.size() < n) v.resize(n);
}

// Keys are in the order of the tokens: larger logits first, and of equal ones (0 and -0 are) the lower index.
uint64_t key_of(float x, int index) {
    uint32_t bits;
    x += 0.0f;
    memcpy(&bits, &x, 4);
    const uint32_t rising = bits ^ ((uint32_t)-(int32_t)(bits >> 31) | 0x80000000u);
    return (uint64_t)~rising << 32 | (uint32_t)index;
}

float logit_of(uint64_t key) {
    const uint32_t rising = ~(uint32_t)(key >> 32);
    const uint32_t bits = rising ^ (((rising >> 31) - 1) | 0x80000000u);
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

// The sum of `n` odds is below 2^53 times the power of two that they are rounded to, which is grain * 2^-23.
float grain_of(int n) {
    int bits = 0;
    while ((int64_t)1 << bits < n) bits++;
    return std::ldexp(1.0f, bits + 23 - 53);
}

void check(int32_t token, int width) {
    if (token < 0 || token >= width) throw std::invalid_argument("a changed token is outside the vocabulary");
}

// For each byte of a mask, what to add to eight logits: 0 or -infinity, with which a NaN stays one.
struct Added {
    float of[256][8];
    Added() {
        for (int byte = 0; byte < 256; byte++)
            for (int i = 0; i < 8; i++) of[byte][i] = byte >> i & 1 ? 0.0f : -INFINITY;
    }
};

void forbid(float* x, int n, const uint32_t* allowed) {
    static const Added added;
    for (int i = 0; i < n; i += 8) {
        const float* by = added.of[allowed[i / 32] >> i % 32 & 255];
        const int count = std::min(8, n - i);
        if (count == 8)
            for (int j = 0; j < 8; j++) x[i + j] += by[j];
        else
            for (int j = 0; j < count; j++) x[i + j] += by[j];
    }
}

void check(const Choice& c) {
    if (!(c.temperature >= 0 && c.top_p > 0 && c.min_p <= 1 && c.noise >= 0 && c.noise < 1))
        throw std::invalid_argument("temperature, top_p, min_p or noise is out of range");
}

}  // namespace

int Chooser::choose(const float* logits, int n, const Choice& how, const Change* change) {
    n_ = n;
    x_ = change ? changed(logits, *change) : logits;
    grow(maxima_, blocks(n));
    float best;
    if (!kernels_->maxima(x_, n, maxima_.data())) return -1;
    const int first = likeliest(&best);
    if (!std::isfinite(best)) return -1;
    if (how.temperature == 0) return first;
    odds_ = {best, (float)std::min(1 / how.temperature, 0x1p100), grain_of(n), (float)how.min_p};
    const bool all = (how.top_k <= 0 || how.top_k >= n) && how.top_p >= 1;
    return all ? by_index(how.noise) : in_order(how);
}

const float* Chooser::changed(const float* logits, const Change& change) {
    grow(own_, n_), grow(counts_, n_);
    float* x = own_.data();
    memcpy(x, logits, (size_t)n_ * 4);
    if (change.repetition != 1) {
        for (int32_t t : change.tokens)
            if (!counts_[t]++) x[t] = x[t] > 0 ? x[t] / change.repetition : x[t] * change.repetition;
        for (int32_t t : change.tokens) counts_[t] = 0;
    }
    if (change.presence != 0 || change.frequency != 0) {
        for (size_t i = change.prompt; i < change.tokens.size(); i++) counts_[change.tokens[i]]++;
        for (size_t i = change.prompt; i < change.tokens.size(); i++) {
            int32_t& count = counts_[change.tokens[i]];
            if (count) x[change.tokens[i]] -= change.presence + change.frequency * (float)count;
            count = 0;
        }
    }
    for (auto [token, value] : change.added) x[token] += value;  // infinity - infinity is NaN, and then there is no token
    if (!change.allowed.empty()) forbid(x, n_, change.allowed.data());
    return x;
}

int Chooser::likeliest(float* best) const {
    const float* most = std::max_element(maxima_.data(), maxima_.data() + blocks(n_));
    *best = *most;
    const float* block = x_ + (most - maxima_.data()) * LOGITS;
    return (int)(std::find(block, std::min(block + LOGITS, x_ + n_), *most) - x_);
}

// -- drawing: the first token at which the running sum of odds exceeds noise times the whole sum -------------------

int Chooser::by_index(double noise) {
    const int count = blocks(n_);
    grow(sums_, count);
    kernels_->sum_odds(x_, n_, odds_, sums_.data());
    const double mark = noise * std::accumulate(sums_.data(), sums_.data() + count, 0.0);
    double sum = 0;
    int at = 0;
    for (; sum + sums_[at] <= mark; at++) sum += sums_[at];
    float odds[LOGITS];
    const int first = at * LOGITS;
    kernels_->odds(x_ + first, std::min(LOGITS, n_ - first), odds_, odds);
    int i = 0;
    while ((sum += odds[i]) <= mark) i++;
    return first + i;
}

int Chooser::in_order(const Choice& how) {
    double total = how.top_k > 0 && how.top_k < n_ ? take(how.top_k) : take(how.top_p);
    if (how.top_p < 1) total = find(std::nextafter(how.top_p * total, 0.0)).sum;  // where the sum reaches that part
    return find(how.noise * total).token;
}

// Keys of the `count` likeliest; the sum of their odds.
double Chooser::take(int count) {
    deep_ = false;
    gather(count <= blocks(n_) ? bound(count) : -INFINITY);
    std::nth_element(keys_.begin(), keys_.begin() + (count - 1), keys_.begin() + count_);
    count_ = count;
    return sum_of(0, count_);
}

// Keys of the likeliest tokens whose odds together are that part of the sum, if they are few. Returns the sum of all odds.
double Chooser::take(double part) {
    grow(sums_, blocks(n_));
    kernels_->sum_odds(x_, n_, odds_, sums_.data());
    const double total = std::accumulate(sums_.data(), sums_.data() + blocks(n_), 0.0);
    deep_ = false;
    for (int wanted = GUESS; wanted <= blocks(n_); wanted *= 4) {
        gather(bound(wanted));
        if (sum_of(0, count_) >= part * total) return total;
    }
    deep_ = true;
    grow(odds_by_token_, n_);
    kernels_->odds(x_, n_, odds_, odds_by_token_.data());
    sink();
    return total;
}

// At least `wanted` logits are so large: one in each of as many blocks.
float Chooser::bound(int wanted) {
    order_.assign(maxima_.begin(), maxima_.begin() + blocks(n_));
    std::nth_element(order_.begin(), order_.begin() + (wanted - 1), order_.end(), std::greater<float>());
    return order_[wanted - 1];
}

// The depth of each token below the likeliest, and the sum of odds at each depth. Depths reach down to where odds vanish, or
// to where few tokens are. All deeper tokens are at the last depth.
void Chooser::sink() {
    const float half = odds_.most - bound((blocks(n_) + 1) / 2), range = std::min(4 * half, 27 / odds_.inverse);
    const float most = odds_.most, by = range > 0 ? DEPTHS / range : 0;
    grow(depths_, n_);
    at_depth_.assign(DEPTHS, 0.0);
    const float *x = x_, *odds = odds_by_token_.data();
    int32_t* depths = depths_.data();
    for (int i = 0, n = n_; i < n; i++) {
        const float depth = (most - x[i]) * by;
        depths[i] = (int32_t)(depth < DEPTHS - 1 ? depth : DEPTHS - 1);
    }
    for (int i = 0; i < n_; i++) at_depth_[depths[i]] += odds[i];
}

// Keys of the tokens whose logits are at least so large.
void Chooser::gather(float least) {
    grow(keys_, n_);
    count_ = 0;
    for (int b = 0; b < blocks(n_); b++) {
        if (maxima_[b] < least) continue;
        for (int i = b * LOGITS; i < std::min((b + 1) * LOGITS, n_); i++) {
            keys_[count_] = key_of(x_[i], i);
            count_ += x_[i] >= least;
        }
    }
}

// Keys of the tokens at a depth.
void Chooser::gather_at(int depth) {
    grow(keys_, n_);
    size_t count = 0;
    const int32_t* depths = depths_.data();
    for (int i = 0, n = n_; i < n; i++)
        if (depths[i] == depth) keys_[count++] = key_of(x_[i], i);
    count_ = count;
}

// The first token, in order, at which the running sum of odds exceeds `mark`.
Chooser::Place Chooser::find(double mark) {
    double sum = 0;
    if (deep_) {
        int at = 0;
        for (; sum + at_depth_[at] <= mark; at++) sum += at_depth_[at];
        gather_at(at);
    }
    size_t first = 0, last = count_;
    while (last - first > SORTED) {
        const size_t middle = first + (last - first) / 2;
        std::nth_element(keys_.begin() + first, keys_.begin() + middle, keys_.begin() + last);
        const double half = sum_of(first, middle);
        if (sum + half > mark) last = middle;
        else sum += half, first = middle;
    }
    std::sort(keys_.begin() + first, keys_.begin() + last);
    float odds[SORTED];
    kernels_->odds(logits_of(first, last), (int)(last - first), odds_, odds);
    size_t i = first;
    while ((sum += odds[i - first]) <= mark) i++;
    return {(int)(uint32_t)keys_[i], sum};
}

double Chooser::sum_of(size_t first, size_t last) {
    const int n = (int)(last - first);
    grow(sums_, blocks(n));
    kernels_->sum_odds(logits_of(first, last), n, odds_, sums_.data());
    return std::accumulate(sums_.data(), sums_.data() + blocks(n), 0.0);
}

const float* Chooser::logits_of(size_t first, size_t last) {
    grow(logits_, last - first);
    for (size_t i = first; i < last; i++) logits_[i - first] = logit_of(keys_[i]);
    return logits_.data();
}

std::vector<int> Sampler::choose(Team& team, const Logits& logits, const std::vector<Choice>& choices,
                                 const std::map<int, Change>& changes) {
    if ((int)choices.size() != logits.rows) throw std::invalid_argument("there must be a choice for each row");
    for (const Choice& c : choices) check(c);
    for (const auto& [row, change] : changes) {
        for (int32_t token : change.tokens) check(token, logits.width);
        for (auto [token, value] : change.added) check(token, logits.width);
        if (!change.allowed.empty() && change.allowed.size() * 32 < (size_t)logits.width)
            throw std::invalid_argument("a mask has fewer bits than the vocabulary has tokens");
    }
    std::vector<int> out(logits.rows);
    const auto one = [&](int thread, int r) {
        const auto change = changes.find(r);
        out[r] = choosers_[thread].choose(logits.data + (size_t)r * logits.stride, logits.width, choices[r],
                                          change == changes.end() ? nullptr : &change->second);
    };
    if (logits.rows == 1) {  // other threads would take longer to come
        one(0, 0);
        return out;
    }
    team.reserve(1);
    team.run([&](Member& member) { member.share(logits.rows, [&](int r) { one(member.id, r); }); });
    return out;
}

}  // namespace dovetail
