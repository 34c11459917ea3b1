#include "huge.h"

#include <sys/mman.h>

#include <algorithm>
#include <mutex>
#include <new>

namespace dovetail {

namespace {

constexpr size_t PAGE = 2 << 20, REGION = 16 * PAGE, LINE = 64;

size_t up(size_t bytes, size_t to) { return (bytes + to - 1) / to * to; }

class Region {
   public:
    explicit Region(size_t bytes) : mapped_(bytes + PAGE) {
        void* p = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (p == MAP_FAILED) throw std::bad_alloc();
        memory_ = (uint8_t*)p;
        at_ = up((uintptr_t)p, PAGE) - (uintptr_t)p;
        end_ = at_ + bytes;
        madvise(memory_ + at_, bytes, MADV_HUGEPAGE);  // a wish: small pages work as well
    }
    ~Region() { munmap(memory_, mapped_); }
    Region(const Region&) = delete;
    Region& operator=(const Region&) = delete;

    uint8_t* take(size_t bytes) {
        if (bytes > end_ - at_) return nullptr;
        uint8_t* p = memory_ + at_;
        at_ += bytes;
        return p;
    }

   private:
    const size_t mapped_;
    uint8_t* memory_;
    size_t at_, end_;
};

}  // namespace

uint8_t* take_huge(size_t bytes, std::shared_ptr<void>& owner) {
    static std::mutex mutex;
    static std::weak_ptr<Region> filling;
    bytes = up(bytes, LINE);
    const std::lock_guard<std::mutex> lock(mutex);
    std::shared_ptr<Region> region = filling.lock();
    uint8_t* p = region ? region->take(bytes) : nullptr;
    if (!p) {
        region = std::make_shared<Region>(std::max(REGION, up(bytes, PAGE)));
        p = region->take(bytes);
        if (bytes < REGION) filling = region;
    }
    owner = region;
    return p;
}

}  // namespace dovetail
