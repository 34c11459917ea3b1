// Threads of one parallel region, and the sharing of work between them.
//
// The region is OpenMP's, so that torch and this library use one runtime and one set of threads. Inside it work is
// taken from a counter per phase, and a phase ends when all its pieces are done: a thread that the system has put
// aside holds up nobody unless it holds a piece.
#pragma once
#include <omp.h>
#include <sched.h>

#include <atomic>
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

struct alignas(64) Phase {
    std::atomic<int> next{0}, done{0};
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
    Team& team_;
    int phase_ = 0;
};

class Team {
   public:
    explicit Team(int threads, int phases = 64) : threads(threads), phases_(phases) {}

    // f(member) on every thread.
    template <class F> void run(F&& f) {
        for (int i = 0; i < used_; i++) phases_[i].next = 0, phases_[i].done = 0;
        used_ = 0;
        if (threads == 1) {
            Member m(*this, 0);
            f(m);
            return;
        }
#pragma omp parallel num_threads(threads)
        {
            Member m(*this, omp_get_thread_num());
            f(m);
        }
    }

    // At least this many `share`s may follow in one `run`.
    void reserve(int phases) {
        if ((int)phases_.size() < phases) phases_ = std::vector<Phase>(phases);
    }

    const int threads;

   private:
    friend class Member;
    std::vector<Phase> phases_;
    int used_ = 0;
};

inline int Member::threads() const { return team_.threads; }

template <class F> void Member::share(int n, F&& f) {
    if (team_.threads == 1) {
        for (int i = 0; i < n; i++) f(i);
        return;
    }
    Phase& phase = team_.phases_[phase_++];
    if (id == 0) team_.used_ = phase_;
    for (int i; (i = phase.next.fetch_add(1, std::memory_order_relaxed)) < n;) {
        f(i);
        phase.done.fetch_add(1, std::memory_order_release);
    }
    for (int spins = 0; phase.done.load(std::memory_order_acquire) < n;) {
        if (++spins < 500) pause_cpu();
        else sched_yield();
    }
}

}  // namespace dovetail
