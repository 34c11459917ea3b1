// Threads of this process that wait for work.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace dovetail {

inline void pause_cpu() {
#if defined(__x86_64__)
    _mm_pause();
#endif
}

using Job = void (*)(void* what, int id);

// job(what, id) on this thread with id 0 and beside it on workers with ids from 1 to threads - 1, each at most once.
//
// It returns when all that began have ended. A worker that has not begun by the time this thread has ended is not waited for
// and never begins, and the system may refuse to start one: so the work must not depend on any id but 0. Regions of several
// threads run at once, each with workers of its own. A forked child starts without workers. The job may not throw.
void run_region(int threads, Job job, void* what) noexcept;

}  // namespace dovetail
