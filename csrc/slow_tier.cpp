#include "slow_tier.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "ring.h"

namespace dovetail {

namespace {

constexpr int TMPFS = 0x01021994;
constexpr size_t MOST_PARTS = 128;  // transfers that one call to the system joins

class Host : public SlowTier {
 public:
    explicit Host(size_t bytes) : bytes_(bytes) {
        void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (p == MAP_FAILED) throw std::runtime_error("the host has no " + std::to_string(bytes) + " bytes for the slow tier");
        memory_ = (uint8_t*)p;
    }
    ~Host() override { munmap(memory_, bytes_); }
    uint8_t* memory() override { return memory_; }
    void read(const std::vector<Transfer>& transfers) override {
        for (const Transfer& t : transfers) memcpy(t.memory, memory_ + t.offset, t.bytes);
    }
    void write(const std::vector<Transfer>& transfers) override {
        for (const Transfer& t : transfers) memcpy(memory_ + t.offset, t.memory, t.bytes);
    }
    std::vector<uint8_t*> wait() override { return {}; }
    bool read_now(const Transfer& t) override {
        memcpy(t.memory, memory_ + t.offset, t.bytes);
        return true;
    }
    bool write_now(const Transfer& t) override {
        memcpy(memory_ + t.offset, t.memory, t.bytes);
        return true;
    }

 private:
    size_t bytes_;
    uint8_t* memory_;
};

int64_t down(int64_t x) { return x / (int64_t)SECTOR * (int64_t)SECTOR; }
int64_t up(int64_t x) { return down(x + (int64_t)SECTOR - 1); }

struct Free {
    void operator()(uint8_t* p) const { free(p); }
};

class Disk : public SlowTier {
 public:
    Disk(const std::string& folder, size_t bytes) {
        struct statfs about;
        if (statfs(folder.c_str(), &about)) fail("cannot be used", folder);
        if (about.f_type == TMPFS)
            throw std::runtime_error("the slow tier's folder '" + folder + "' is memory, not a disk; choose another one");
        std::string name = folder + "/dovetail-kv-XXXXXX";
        file_ = mkostemp(name.data(), O_DIRECT);
        if (file_ < 0) fail("takes no file that is read past the page cache", folder);
        unlink(name.c_str());
        const int error = posix_fallocate(file_, 0, up((int64_t)bytes));
        if (error) {
            close(file_);
            errno = error;
            fail("has no room for " + std::to_string(bytes) + " bytes", folder);
        }
    }
    ~Disk() override {
        wait();
        close(file_);
    }
    void read(const std::vector<Transfer>& transfers) override { begin(transfers, false); }
    void write(const std::vector<Transfer>& transfers) override { begin(transfers, true); }
    std::vector<uint8_t*> wait() override;
    bool read_now(const Transfer& t) override { return at_once(t, false); }
    bool write_now(const Transfer& t) override { return at_once(t, true); }
    int descriptor() const override { return file_; }

 private:
    // Neighbours in the file are transferred by one call. What is not whole sectors goes through memory of the call.
    struct Call {
        bool write;
        int64_t offset;
        size_t bytes = 0;
        std::vector<iovec> parts;
        std::vector<Transfer> direct, staged;  // staged: `offset` is from the call's first byte
        std::unique_ptr<uint8_t, Free> stage;
    };

    [[noreturn]] static void fail(const std::string& what, const std::string& folder) {
        throw std::runtime_error("the slow tier's folder '" + folder + "' " + what + ": " + strerror(errno));
    }
    static bool whole(const Transfer& t) {
        return t.offset % SECTOR == 0 && t.bytes % SECTOR == 0 && (uintptr_t)t.memory % SECTOR == 0;
    }
    void begin(const std::vector<Transfer>& transfers, bool write);
    bool at_once(const Transfer& t, bool write) const;
    void start(Call call);
    bool finish(const Call& call, int64_t done) const;

    int file_ = -1;
    Ring ring_;
    std::vector<std::unique_ptr<Call>> calls_;
    std::vector<uint8_t*> failed_;
};

void Disk::begin(const std::vector<Transfer>& transfers, bool write) {
    std::vector<Transfer> sorted(transfers);
    std::sort(sorted.begin(), sorted.end(), [](const Transfer& a, const Transfer& b) { return a.offset < b.offset; });
    for (size_t i = 0; i < sorted.size();) {
        Call call{write, down(sorted[i].offset), 0, {}, {}, {}, nullptr};
        int64_t end = call.offset;
        if (whole(sorted[i])) {
            for (; i < sorted.size() && whole(sorted[i]) && sorted[i].offset == end && call.parts.size() < MOST_PARTS; i++) {
                call.parts.push_back({sorted[i].memory, sorted[i].bytes});
                call.direct.push_back(sorted[i]);
                end += (int64_t)sorted[i].bytes;
            }
        } else {  // a write fills its sectors alone: blobs are placed so that no two share a sector
            for (; i < sorted.size() && !whole(sorted[i]) && call.staged.size() < MOST_PARTS; i++) {
                if (!call.staged.empty() && (write ? sorted[i].offset != end : down(sorted[i].offset) > end)) break;
                call.staged.push_back({sorted[i].offset - call.offset, sorted[i].memory, sorted[i].bytes});
                end = std::max(end, up(sorted[i].offset + (int64_t)sorted[i].bytes));
            }
        }
        call.bytes = (size_t)(end - call.offset);
        if (!call.staged.empty()) {
            call.stage.reset((uint8_t*)aligned_alloc(SECTOR, call.bytes));
            if (write) memset(call.stage.get(), 0, call.bytes);
            for (const Transfer& t : call.staged)
                if (write) memcpy(call.stage.get() + t.offset, t.memory, t.bytes);
            call.parts.push_back({call.stage.get(), call.bytes});
        }
        start(std::move(call));
    }
    ring_.submit();
}

void Disk::start(Call call) {
    calls_.push_back(std::make_unique<Call>(std::move(call)));
    const Call& c = *calls_.back();
    ring_.add({c.write, file_, c.offset, c.parts.data(), (unsigned)c.parts.size()});
}

bool Disk::at_once(const Transfer& t, bool write) const {
    const int64_t first = down(t.offset), bytes = up(t.offset + (int64_t)t.bytes) - first;
    const std::unique_ptr<uint8_t, Free> stage((uint8_t*)aligned_alloc(SECTOR, (size_t)bytes));
    uint8_t* inside = stage.get() + (t.offset - first);
    if (!write) {
        if (pread(file_, stage.get(), (size_t)bytes, first) != bytes) return false;
        memcpy(t.memory, inside, t.bytes);
        return true;
    }
    memset(stage.get(), 0, (size_t)bytes);
    memcpy(inside, t.memory, t.bytes);
    return pwrite(file_, stage.get(), (size_t)bytes, first) == bytes;
}

// The rest of a call that the system did in part, and the copies out of staging memory.
bool Disk::finish(const Call& call, int64_t done) const {
    if (done != (int64_t)call.bytes) {
        done = call.write ? pwritev(file_, call.parts.data(), (int)call.parts.size(), call.offset)
                          : preadv(file_, call.parts.data(), (int)call.parts.size(), call.offset);
        if (done != (int64_t)call.bytes) return false;
    }
    if (!call.write)
        for (const Transfer& t : call.staged) memcpy(t.memory, call.stage.get() + t.offset, t.bytes);
    return true;
}

std::vector<uint8_t*> Disk::wait() {
    const std::vector<int64_t> done = ring_.wait();
    for (size_t i = 0; i < calls_.size(); i++) {
        if (finish(*calls_[i], done[i])) continue;
        for (const Transfer& t : calls_[i]->direct) failed_.push_back(t.memory);
        for (const Transfer& t : calls_[i]->staged) failed_.push_back(t.memory);
    }
    calls_.clear();
    std::vector<uint8_t*> failed;
    failed.swap(failed_);
    return failed;
}

}  // namespace

std::unique_ptr<SlowTier> host_tier(size_t bytes) { return std::make_unique<Host>(bytes); }

std::unique_ptr<SlowTier> disk_tier(const std::string& folder, size_t bytes) { return std::make_unique<Disk>(folder, bytes); }

}  // namespace dovetail
