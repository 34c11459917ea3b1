// Zeroed memory in huge pages, for data that is read as one stream.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>

namespace dovetail {

// `bytes` that begin on a cache line and live as long as `owner`. Small requests share regions, because most weights of a
// small model are smaller than a huge page, and a stream over small pages waits for the page tables.
uint8_t* take_huge(size_t bytes, std::shared_ptr<void>& owner);

}  // namespace dovetail
