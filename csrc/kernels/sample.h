// A row of logits, 64 at a time: maxima, and odds against the likeliest token.
#pragma once
#include "../kernels.h"

namespace {

using dovetail::LOGITS;
using dovetail::Odds;

// f(x, i) for every block, i its first index; the last one is filled up with -infinity, which changes no result.
template <class Each> INLINE void each_block(const float* x, int n, Each f) {
    int i = 0;
    for (; i + LOGITS <= n; i += LOGITS) f(x + i, i);
    if (i == n) return;
    alignas(64) float last[LOGITS];
    for (int j = 0; j < LOGITS; j++) last[j] = i + j < n ? x[i + j] : -__builtin_inff();
    f(last, i);
}

bool maxima(const float* x, int n, float* y) {
    M sound = not_nan(zero());
    each_block(x, n, [&](const float* block, int at) {
        F high = all(-__builtin_inff());
        UNROLL for (int i = 0; i < LOGITS; i += 16) {
            const F v = load(block + i);
            high = max(v, high), sound = both(sound, not_nan(v));
        }
        y[at / LOGITS] = highest(high);
    });
    return sum(keep(sound, all(1.0f))) == 16.0f;
}

// e^z for z in [-80, 0], within 1e-7 relative, and 1 for 0. Multiplications and additions are separate, so that any IEEE
// float32 gives these bits. runtime/odds.py is the same in torch.
INLINE F odds_exponential(F z) {
    const F n = round_even(mul(z, all(1.44269504f)));
    const F r = add(sub(z, mul(n, all(0.693359375f))), mul(n, all(2.12194440e-4f)));
    F p = add(mul(r, all(0.0013814561f)), all(0.008368735f));
    p = add(mul(p, r), all(0.04166839f));
    p = add(mul(p, r), all(0.16666521f));
    p = add(mul(p, r), all(0.49999994f));
    p = add(mul(p, r), all(1.0f));
    p = add(mul(p, r), all(1.0f));
    return times_power_of_two(p, n);
}

INLINE F odds_of(F x, const Odds& how) {
    const F z = mul(sub(x, all(how.most)), all(how.inverse)), grain = all(how.grain);
    const F y = odds_exponential(max(z, all(-80.0f)));
    const F even = choose(not_less(y, grain), y, sub(add(y, grain), grain));
    return keep(not_less(even, all(how.least)), even);
}

void odds(const float* x, int n, const Odds& how, float* y) {
    each_block(x, n, [&](const float* block, int at) {
        alignas(64) float out[LOGITS];
        UNROLL for (int i = 0; i < LOGITS; i += 16) store(out + i, odds_of(load(block + i), how));
        for (int i = 0; i < LOGITS && at + i < n; i++) y[at + i] = out[i];
    });
}

void sum_odds(const float* x, int n, const Odds& how, double* y) {
    each_block(x, n, [&](const float* block, int at) {
        D total = dzero();
        UNROLL for (int i = 0; i < LOGITS; i += 16) total = dadd(total, odds_of(load(block + i), how));
        y[at / LOGITS] = sum(total);
    });
}

inline void add_sample(dovetail::Kernels& k) { k.maxima = maxima, k.odds = odds, k.sum_odds = sum_odds; }

}  // namespace
