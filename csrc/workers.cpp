// A region borrows idle workers, those that were busy last first, and starts the ones that are missing. Each worker waits for a
// word of its own to change, so a region wakes only those that it uses. After a region a worker spins, because the next step
// is near while text is generated, and then sleeps.
#include "workers.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <mutex>
#include <new>

// A library that was linked with a new glibc shall run with an old one. So these are the functions' first versions. And
// libstdc++ finds its flag here, which glibc has since 2.32: that threads may exist is always right.
#if defined(__GLIBC__)
extern "C" __attribute__((visibility("hidden"))) char __libc_single_threaded;
char __libc_single_threaded = 0;
#if defined(__x86_64__)
__asm__(".symver pthread_create, pthread_create@GLIBC_2.2.5");
__asm__(".symver pthread_sigmask, pthread_sigmask@GLIBC_2.2.5");
#endif
#endif

namespace dovetail {

namespace {

using Clock = std::chrono::steady_clock;

// Longer than what Python does between two steps. Without it 8 streams of a small model were 6 % slower on two cores.
constexpr auto SPIN = std::chrono::milliseconds(1);
constexpr int PAUSES = 500;  // then it yields in between: the core may be wanted by others

enum State : uint32_t { IDLE, ASLEEP, CALLED, BUSY };

struct alignas(64) Worker {
    std::atomic<uint32_t> state{IDLE};
    int id = 0;
    Job job = nullptr;
    void* what = nullptr;
    Worker* next = nullptr;  // in the list of idle workers, or in that of a region

    void call();
    void dismiss();
    void live();

   private:
    void wait();
    void sleep();
};

// A region asks it to begin.
void Worker::call() {
    if (state.exchange(CALLED) == ASLEEP) syscall(SYS_futex, &state, FUTEX_WAKE_PRIVATE, 1, nullptr, nullptr, 0);
}

// A region needs it no more: it has ended when this returns, or does not begin.
void Worker::dismiss() {
    uint32_t called = CALLED;
    if (state.compare_exchange_strong(called, IDLE)) return;
    for (int spins = 0; state.load(std::memory_order_acquire) == BUSY;) {
        if (++spins < 500) pause_cpu();
        else sched_yield();
    }
}

void Worker::live() {
    for (;;) {
        wait();
        uint32_t called = CALLED;
        if (!state.compare_exchange_strong(called, BUSY)) continue;
        job(what, id);
        state.store(IDLE, std::memory_order_release);
    }
}

void Worker::wait() {
    const auto until = Clock::now() + SPIN;
    for (int spins = 1; state.load(std::memory_order_relaxed) == IDLE; spins++) {
        if (spins < PAUSES) pause_cpu();
        else sched_yield();
        if (spins % 64 == 0 && Clock::now() > until) return sleep();
    }
}

void Worker::sleep() {
    uint32_t idle = IDLE;
    if (!state.compare_exchange_strong(idle, ASLEEP)) return;
    while (state.load() == ASLEEP) syscall(SYS_futex, &state, FUTEX_WAIT_PRIVATE, ASLEEP, nullptr, nullptr, 0);
}

void* live(void* worker) {
    prctl(PR_SET_NAME, "dovetail");
    ((Worker*)worker)->live();
    return nullptr;
}

// A worker takes only signals that report its own faults: all others are for the threads that were there before.
bool start(Worker* worker) {
    sigset_t blocked, before;
    sigfillset(&blocked);
    for (int fault : {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGTRAP, SIGABRT, SIGSYS}) sigdelset(&blocked, fault);
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_sigmask(SIG_SETMASK, &blocked, &before);
    pthread_t thread;
    const bool started = pthread_create(&thread, &attributes, live, worker) == 0;
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    pthread_attr_destroy(&attributes);
    return started;
}

// Workers outlive every object: they are there until the process ends.
class Pool {
   public:
    // A list of `count` workers, or fewer if the system gives no more.
    Worker* borrow(int count) {
        const std::lock_guard<std::mutex> lock(mutex_);
        Worker* out = nullptr;
        for (; count > 0; count--) {
            Worker* worker = idle_;
            if (worker) idle_ = worker->next;
            else if (!(worker = started())) break;
            worker->next = out, out = worker;
        }
        return out;
    }

    void give_back(Worker* workers) {
        const std::lock_guard<std::mutex> lock(mutex_);
        while (workers) {
            Worker* next = workers->next;
            workers->next = idle_, idle_ = workers;
            workers = next;
        }
    }

   private:
    static Worker* started() {
        Worker* worker = new (std::nothrow) Worker;
        if (worker && start(worker)) return worker;
        delete worker;
        return nullptr;
    }

    std::mutex mutex_;
    Worker* idle_ = nullptr;
};

Pool& pool() {
    static Pool* const pool = [] {
        static Pool* made = new Pool;
        // A forked child has none of these threads, and one of them may have held the lock.
        pthread_atfork(nullptr, nullptr, [] { new (made) Pool; });
        return made;
    }();
    return *pool;
}

}  // namespace

void run_region(int threads, Job job, void* what) noexcept {
    if (threads <= 1) return job(what, 0);
    Worker* const workers = pool().borrow(threads - 1);
    int id = 1;
    for (Worker* w = workers; w; w = w->next) {
        w->job = job, w->what = what, w->id = id++;
        w->call();
    }
    job(what, 0);
    for (Worker* w = workers; w; w = w->next) w->dismiss();
    pool().give_back(workers);
}

}  // namespace dovetail
