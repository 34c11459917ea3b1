// What holds blobs that the device has no room for: memory of the host, or a file that is read and written past the
// system's page cache, so that it does not turn into memory unnoticed.
#pragma once
#include <sys/uio.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace dovetail {

constexpr size_t SECTOR = 4096;  // what a disk reads and writes

// Bytes [offset, offset + bytes) of the tier, and the memory that they come from or go to.
struct Transfer {
    int64_t offset;
    uint8_t* memory;
    size_t bytes;
};

class SlowTier {
 public:
    virtual ~SlowTier() = default;
    // Where its bytes can be addressed; or null, and they have to be transferred.
    virtual uint8_t* memory() { return nullptr; }
    // Begin transfers. Memory that is written must stay, memory that is read is filled, until `wait` returns.
    virtual void read(const std::vector<Transfer>& transfers) = 0;
    virtual void write(const std::vector<Transfer>& transfers) = 0;
    // Ends all transfers. The memory of those that failed.
    virtual std::vector<uint8_t*> wait() = 0;
    // By itself, on any thread: whether it succeeded.
    virtual bool read_now(const Transfer& transfer) = 0;
    virtual bool write_now(const Transfer& transfer) = 0;
    virtual int descriptor() const { return -1; }
};

// Memory of this process, taken as it is written.
std::unique_ptr<SlowTier> host_tier(size_t bytes);

// A file without a name in `folder`. Throws std::runtime_error where there is no room, or no direct transfer.
std::unique_ptr<SlowTier> disk_tier(const std::string& folder, size_t bytes);

}  // namespace dovetail
