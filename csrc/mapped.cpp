#include "mapped.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <system_error>

#include "team.h"

namespace dovetail {

namespace {

constexpr size_t CHUNK = 1 << 20;  // bytes that one thread sums
constexpr uint64_t ODD = 0x9E3779B97F4A7C15ull;

// Every step is a bijection of the sum and of the word, so a change of one word is never lost.
uint64_t mix(uint64_t sum, uint64_t word) {
    const uint64_t x = (sum ^ word) * ODD;
    return x << 29 | x >> 35;
}

uint64_t checksum(const uint8_t* p, size_t bytes) {
    constexpr int LANES = 8;  // products that are under way at the same time
    uint64_t sums[LANES], words[LANES];
    for (int i = 0; i < LANES; i++) sums[i] = mix(bytes, i + 1);
    for (; bytes >= sizeof words; p += sizeof words, bytes -= sizeof words) {
        __builtin_prefetch(p + 2048);
        memcpy(words, p, sizeof words);
        for (int i = 0; i < LANES; i++) sums[i] = mix(sums[i], words[i]);
    }
    memset(words, 0, sizeof words);
    memcpy(words, p, bytes);
    uint64_t all = 0;
    for (int i = 0; i < LANES; i++) all = mix(all, mix(sums[i], words[i]));
    return all;
}

}  // namespace

Mapping::Mapping(int file, size_t bytes) : bytes(bytes) {
    void* p = mmap(nullptr, bytes, PROT_READ, MAP_SHARED, file, 0);
    if (p == MAP_FAILED) throw std::system_error(errno, std::generic_category(), "mmap");
    data = (const uint8_t*)p;
    madvise(p, bytes, MADV_HUGEPAGE);  // a wish: small pages work as well
    madvise(p, bytes, MADV_WILLNEED);
}

Mapping::~Mapping() { munmap((void*)data, bytes); }

std::vector<uint64_t> checksums(const std::vector<std::pair<const uint8_t*, size_t>>& ranges, int threads) {
    std::vector<std::pair<const uint8_t*, size_t>> chunks;
    std::vector<size_t> first;
    for (const auto& [data, bytes] : ranges) {
        first.push_back(chunks.size());
        for (size_t at = 0; at < bytes; at += CHUNK) chunks.emplace_back(data + at, std::min(CHUNK, bytes - at));
    }
    first.push_back(chunks.size());
    std::vector<uint64_t> sums(chunks.size()), out;
    const auto sum = [&](int i) { sums[i] = checksum(chunks[i].first, chunks[i].second); };
    Team(threads, 1).run([&](Member& member) { member.share((int)chunks.size(), sum); });
    for (size_t r = 0; r < ranges.size(); r++)
        out.push_back(checksum((const uint8_t*)(sums.data() + first[r]), (first[r + 1] - first[r]) * 8));
    return out;
}

}  // namespace dovetail
