// Transfers of files that the system carries out by itself (io_uring). Where it does not allow that, they are done when they
// are waited for.
#pragma once
#include <sys/uio.h>

#include <cstdint>
#include <vector>

namespace dovetail {

struct FileCall {
    bool write;
    int file;
    int64_t offset;
    const iovec* parts;
    unsigned count;
};

class Ring {
 public:
    Ring();
    ~Ring();
    Ring(const Ring&) = delete;
    Ring& operator=(const Ring&) = delete;

    void add(const FileCall& call);
    void submit();  // start what was added
    // Waits for all calls since the last wait. For each, in the order of `add`: bytes transferred, or an error below 0.
    std::vector<int64_t> wait();

 private:
    struct Shared;  // memory shared with the system's kernel
    void push(const FileCall& call, uint64_t index);
    void reap(unsigned at_least);

    Shared* shared_ = nullptr;  // null: there is no ring
    std::vector<FileCall> calls_;
    std::vector<int64_t> done_;
    size_t submitted_ = 0, finished_ = 0;
};

}  // namespace dovetail
