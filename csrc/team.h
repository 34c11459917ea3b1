// Threads of one parallel region, and the sharing of work between them.
//
// The region is OpenMP's, so that torch and this library use one runtime and one set of threads. In a phase every
// thread has a range of its own and then takes from the others' ranges; the phase ends when all pieces are done. So
// a thread that the system has put aside holds up nobody unless it holds a piece, and cores that are far apart touch
// each other's cache lines once per phase.
#pragma once
#include <omp.h>
#include <sched.h>

#include <atomic>
#include <climits>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace dovetail {

inline void pause_cpu() {
#if defined(__x86_64__)
    _mm_pause();
#endif
}

struct alignas(64) Counter {
    std::atomic<int> value{0};
};

class Team;

// One thread's view. All members call `share` in the same order.
class Member {
   public:
    Member(Team& team, int id, int count);
    ~Member();

    // f(i) for every i in [0, n), each by one member; returns when all are done.
    template <class F> void share(int n, F&& f);
    int threads() const;

    const int id;

   private:
    template <class F> int take(int owner, int n, F& f);

    Team& team_;
    const int count_;  // of threads that the region really has: limits of OpenMP may allow fewer than asked for
    int phase_ = 0;
};

class Team {
   public:
    explicit Team(int threads) : threads(threads) { reserve(64); }

    // At least this many `share`s may follow in one `run`.
    void reserve(int phases) {
        if (phases <= phases_) return;
        phases_ = phases;
        next_ = std::vector<Counter>((size_t)phases * threads);
        for (auto& done : done_) done = std::vector<Counter>(phases);
        for (Counter& c : next_) c.value = INT_MAX / 2;
    }

    // f(member) on every thread.
    template <class F> void run(F&& f) {
        turn_ ^= 1;
        if (threads == 1) {
            Member m(*this, 0, 1);
            f(m);
            return;
        }
#pragma omp parallel num_threads(threads)
        {
            Member m(*this, omp_get_thread_num(), omp_get_num_threads());
            f(m);
        }
    }

    const int threads;

   private:
    friend class Member;
    Counter& next(int owner, int phase) { return next_[(size_t)owner * phases_ + phase]; }

    int phases_ = 0, turn_ = 0;
    std::vector<Counter> next_;     // [thread][phase]: pieces of its range given out; far beyond any range between runs
    std::vector<Counter> done_[2];  // pieces done, for this run and the next in turns
};

inline Member::Member(Team& team, int id, int count) : id(id), team_(team), count_(count) {
    if (count_ == 1) return;
    for (int p = 0; p < team_.phases_; p++) team_.next(id, p).value.store(0, std::memory_order_relaxed);
    std::atomic_thread_fence(std::memory_order_release);
}

inline Member::~Member() {
    if (count_ == 1) return;
    for (int p = 0; p < team_.phases_; p++) team_.next(id, p).value.store(INT_MAX / 2, std::memory_order_relaxed);
    if (id == 0)  // the set of the run before this one, which is the next one's
        for (int p = 0; p < team_.phases_; p++) team_.done_[team_.turn_ ^ 1][p].value.store(0, std::memory_order_relaxed);
}

inline int Member::threads() const { return count_; }

template <class F> int Member::take(int owner, int n, F& f) {
    const int first = (int)((long long)n * owner / count_), count = (int)((long long)n * (owner + 1) / count_) - first;
    std::atomic<int>& next = team_.next(owner, phase_).value;
    int taken = 0;
    if (next.load(std::memory_order_relaxed) >= count) return 0;
    for (int i; (i = next.fetch_add(1, std::memory_order_acq_rel)) < count; taken++) f(first + i);
    return taken;
}

template <class F> void Member::share(int n, F&& f) {
    if (count_ == 1) {
        for (int i = 0; i < n; i++) f(i);
        return;
    }
    int mine = 0;
    for (int k = 0; k < count_; k++) mine += take((id + k) % count_, n, f);
    std::atomic<int>& done = team_.done_[team_.turn_][phase_].value;
    phase_++;
    if (mine) done.fetch_add(mine, std::memory_order_acq_rel);
    for (int spins = 0; done.load(std::memory_order_acquire) < n;) {
        if (++spins < 500) pause_cpu();
        else sched_yield();
    }
}

}  // namespace dovetail
