// Zeroed memory in huge pages, for what is read as one stream.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>

namespace dovetail {

// `bytes` on a cache line of their own, which live as long as `owner`. Small requests share regions: most weights of a
// small model are below the size of a huge page, and a stream over small pages waits for the page tables.
uint8_t* take_huge(size_t bytes, std::shared_ptr<void>& owner);

}  // namespace dovetail
