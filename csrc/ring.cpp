#include "ring.h"

#include <errno.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#if __has_include(<linux/io_uring.h>)
#include <linux/io_uring.h>
#define DOVETAIL_RING 1
#endif

namespace dovetail {

namespace {

constexpr unsigned ENTRIES = 128;  // calls under way at a time

int64_t at_once(const FileCall& c) {
    return c.write ? pwritev(c.file, c.parts, (int)c.count, c.offset) : preadv(c.file, c.parts, (int)c.count, c.offset);
}

}  // namespace

#ifdef DOVETAIL_RING

struct Ring::Shared {
    int fd = -1;
    uint8_t *queue = nullptr, *done = nullptr;
    size_t queue_bytes = 0, done_bytes = 0;
    io_uring_sqe* entries = nullptr;
    unsigned *tail, *mask, *array, *done_head, *done_tail, *done_mask;
    io_uring_cqe* results;

    bool open() {
        io_uring_params p{};
        fd = (int)syscall(__NR_io_uring_setup, ENTRIES, &p);
        if (fd < 0) return false;
        queue_bytes = p.sq_off.array + p.sq_entries * sizeof(unsigned);
        done_bytes = p.cq_off.cqes + p.cq_entries * sizeof(io_uring_cqe);
        queue = (uint8_t*)map(queue_bytes, IORING_OFF_SQ_RING), done = (uint8_t*)map(done_bytes, IORING_OFF_CQ_RING);
        entries = (io_uring_sqe*)map(ENTRIES * sizeof(io_uring_sqe), IORING_OFF_SQES);
        if (!queue || !done || !entries) return false;
        tail = (unsigned*)(queue + p.sq_off.tail), mask = (unsigned*)(queue + p.sq_off.ring_mask);
        array = (unsigned*)(queue + p.sq_off.array);
        done_head = (unsigned*)(done + p.cq_off.head), done_tail = (unsigned*)(done + p.cq_off.tail);
        done_mask = (unsigned*)(done + p.cq_off.ring_mask), results = (io_uring_cqe*)(done + p.cq_off.cqes);
        return true;
    }
    void* map(size_t bytes, uint64_t what) const {
        void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, (off_t)what);
        return p == MAP_FAILED ? nullptr : p;
    }
    ~Shared() {
        if (queue) munmap(queue, queue_bytes);
        if (done) munmap(done, done_bytes);
        if (entries) munmap(entries, ENTRIES * sizeof(io_uring_sqe));
        if (fd >= 0) close(fd);
    }
};

Ring::Ring() : shared_(new Shared) {
    if (shared_->open()) return;
    delete shared_;
    shared_ = nullptr;
}

void Ring::push(const FileCall& c, uint64_t index) {
    Shared& s = *shared_;
    const unsigned tail = *s.tail, at = tail & *s.mask;
    io_uring_sqe& e = s.entries[at];
    memset(&e, 0, sizeof e);
    e.opcode = c.write ? IORING_OP_WRITEV : IORING_OP_READV;
    e.fd = c.file, e.off = (uint64_t)c.offset, e.addr = (uint64_t)(uintptr_t)c.parts, e.len = c.count, e.user_data = index;
    s.array[at] = at;
    __atomic_store_n(s.tail, tail + 1, __ATOMIC_RELEASE);
}

// Takes the calls that have ended, and waits until there are `at_least` so many.
void Ring::reap(unsigned at_least) {
    Shared& s = *shared_;
    for (unsigned found = 0;;) {
        unsigned head = *s.done_head;
        const unsigned tail = __atomic_load_n(s.done_tail, __ATOMIC_ACQUIRE);
        for (; head != tail; head++, found++) {
            const io_uring_cqe& r = s.results[head & *s.done_mask];
            done_[r.user_data] = r.res;
        }
        __atomic_store_n(s.done_head, head, __ATOMIC_RELEASE);
        if (found >= at_least) {
            finished_ += found;
            return;
        }
        syscall(__NR_io_uring_enter, s.fd, 0, at_least - found, IORING_ENTER_GETEVENTS, nullptr, 0);
    }
}

#else

struct Ring::Shared {};
Ring::Ring() = default;
void Ring::push(const FileCall&, uint64_t) {}
void Ring::reap(unsigned) {}

#endif

Ring::~Ring() { delete shared_; }

void Ring::add(const FileCall& call) { calls_.push_back(call), done_.push_back(-1); }

void Ring::submit() {
#ifdef DOVETAIL_RING
    while (shared_ && submitted_ < calls_.size()) {
        const size_t room = ENTRIES - (submitted_ - finished_);
        if (room == 0) {
            reap(1);
            continue;
        }
        const unsigned n = (unsigned)std::min(room, calls_.size() - submitted_);
        for (unsigned i = 0; i < n; i++) push(calls_[submitted_ + i], submitted_ + i);
        for (unsigned left = n; left > 0;) {
            const long taken = syscall(__NR_io_uring_enter, shared_->fd, left, 0, 0, nullptr, 0);
            if (taken > 0) left -= (unsigned)taken;
            else if (taken < 0 && errno == EBUSY) reap(1);
            else if (taken < 0 && errno != EINTR && errno != EAGAIN) {
                __atomic_store_n(shared_->tail, *shared_->tail - left, __ATOMIC_RELEASE);  // these count as failed
                finished_ += left, left = 0;
            }
        }
        submitted_ += n;
    }
#endif
}

std::vector<int64_t> Ring::wait() {
    if (shared_) {
        submit();
        if (submitted_ > finished_) reap((unsigned)(submitted_ - finished_));
    } else {
        for (size_t i = 0; i < calls_.size(); i++) done_[i] = at_once(calls_[i]);
    }
    std::vector<int64_t> done;
    done.swap(done_);
    calls_.clear(), submitted_ = finished_ = 0;
    return done;
}

}  // namespace dovetail
