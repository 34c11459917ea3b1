// Files mapped into memory, and checksums of what lies there.
#pragma once
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace dovetail {

// The first `bytes` of an open file, to be read. Its pages are the page cache's, so all processes that map the file share
// them. They are huge where the file system keeps them so.
class Mapping {
   public:
    Mapping(int file, size_t bytes);  // the file may be closed afterwards
    ~Mapping();
    Mapping(const Mapping&) = delete;
    Mapping& operator=(const Mapping&) = delete;

    const uint8_t* data;
    const size_t bytes;
};

// A checksum of each range, on so many threads, whose number does not change it. It tells every change of a single word of 8
// bytes, and any other but by a chance of 2^-64. It is no protection from forgery.
std::vector<uint64_t> checksums(const std::vector<std::pair<const uint8_t*, size_t>>& ranges, int threads);

}  // namespace dovetail
