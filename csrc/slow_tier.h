// Holds blobs that the device has no room for: in memory of the host, or in a file. A file is read and written past the
// system's page cache, because cached pages would be memory that nobody counts.
#pragma once
#include <sys/uio.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace dovetail {

constexpr size_t SECTOR = 4096;  // bytes that a disk reads and writes together

// Bytes [offset, offset + bytes) of the tier, and the memory that they come from or go to.
struct Transfer {
    int64_t offset;
    uint8_t* memory;
    size_t bytes;
};

class SlowTier {
 public:
    virtual ~SlowTier() = default;
    // The address of its bytes; or null, if they have to be transferred.
    virtual uint8_t* memory() { return nullptr; }
    // Begin transfers. Until `wait` returns, memory that is written to the tier must not change, and memory that is read
    // into is not ready.
    virtual void read(const std::vector<Transfer>& transfers) = 0;
    virtual void write(const std::vector<Transfer>& transfers) = 0;
    // Waits for all transfers. Returns the memory of those that failed.
    virtual std::vector<uint8_t*> wait() = 0;
    // One transfer at once, on any thread. Returns whether it succeeded.
    virtual bool read_now(const Transfer& transfer) = 0;
    virtual bool write_now(const Transfer& transfer) = 0;
    virtual int descriptor() const { return -1; }
};

// Memory of this process. The system gives it page by page as it is written.
std::unique_ptr<SlowTier> host_tier(size_t bytes);

// A file without a name in `folder`. Throws std::runtime_error if there is no room, or if direct transfers are impossible.
std::unique_ptr<SlowTier> disk_tier(const std::string& folder, size_t bytes);

}  // namespace dovetail
