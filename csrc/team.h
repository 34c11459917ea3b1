// Threads of one parallel region, and the sharing of work between them.
//
// In a phase every thread has a range of its own, and then takes from the others' ranges. The phase ends when all pieces are
// done. So a thread that the system has paused or not started yet delays the others only if it holds a piece. Cores that are
// far apart touch each other's cache lines once per phase.
#pragma once
#include <sched.h>

#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "workers.h"

namespace dovetail {

// A count that begins at zero in every run: its high bits say to which run its low bits belong.
class alignas(64) Counter {
   public:
    // The count before, to which n is added.
    int add(uint64_t run, int n) {
        uint64_t v = value_.load(std::memory_order_acquire);
        for (;;) {
            const uint64_t count = v >> BITS == run ? v & MASK : 0;
            const uint64_t next = run << BITS | (count + (uint64_t)n);
            if (value_.compare_exchange_weak(v, next, std::memory_order_acq_rel, std::memory_order_acquire)) return (int)count;
        }
    }
    int get(uint64_t run) const {
        const uint64_t v = value_.load(std::memory_order_acquire);
        return v >> BITS == run ? (int)(v & MASK) : 0;
    }

   private:
    static constexpr int BITS = 28;  // pieces of a phase; 2^36 runs before numbers come again
    static constexpr uint64_t MASK = (1 << BITS) - 1;
    std::atomic<uint64_t> value_{0};
};

class Team;

// One thread's view. All members call `share` in the same order.
class Member {
   public:
    Member(Team& team, int id) : id(id), team_(team) {}

    // f(i) for every i in [0, n), each by one member; returns when all are done.
    template <class F> void share(int n, F&& f);
    int threads() const;

    const int id;

   private:
    template <class F> int take(int owner, int n, F& f);

    Team& team_;
    int phase_ = 0;
};

class Team {
   public:
    explicit Team(int threads, int phases = 64) : threads(threads) {
        if (threads < 1) throw std::invalid_argument("threads must be at least 1, got " + std::to_string(threads));
        reserve(phases);
    }

    // At least this many `share`s may follow in one `run`.
    void reserve(int phases) {
        if (phases <= phases_) return;
        phases_ = phases;
        next_ = std::vector<Counter>((size_t)phases * threads);
        done_ = std::vector<Counter>(phases);
    }

    // f(member) on this thread and on those of the others that come in time. Nothing that f does may throw.
    template <class F> void run(F&& f) {
        run_++;
        auto one = [&](int id) {
            Member member(*this, id);
            f(member);
        };
        run_region(threads, [](void* what, int id) { (*(decltype(one)*)what)(id); }, &one);
    }

    const int threads;

   private:
    friend class Member;
    Counter& next(int owner, int phase) { return next_[(size_t)owner * phases_ + phase]; }

    int phases_ = 0;
    uint64_t run_ = 0;
    std::vector<Counter> next_;  // [thread][phase]: pieces of its range given out
    std::vector<Counter> done_;  // [phase]: pieces done
};

inline int Member::threads() const { return team_.threads; }

template <class F> int Member::take(int owner, int n, F& f) {
    const int threads = team_.threads;
    const int first = (int)((long long)n * owner / threads), count = (int)((long long)n * (owner + 1) / threads) - first;
    Counter& next = team_.next(owner, phase_);
    int taken = 0;
    if (next.get(team_.run_) >= count) return 0;
    for (int i; (i = next.add(team_.run_, 1)) < count; taken++) f(first + i);
    return taken;
}

template <class F> void Member::share(int n, F&& f) {
    const int threads = team_.threads;
    if (threads == 1) {
        for (int i = 0; i < n; i++) f(i);
        return;
    }
    int mine = 0;
    for (int k = 0; k < threads; k++) mine += take((id + k) % threads, n, f);
    Counter& done = team_.done_[phase_++];
    if (mine) done.add(team_.run_, mine);
    for (int spins = 0; done.get(team_.run_) < n;) {
        if (++spins < 500) pause_cpu();
        else sched_yield();
    }
}

}  // namespace dovetail
