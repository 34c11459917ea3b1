#include "bandwidth.h"

#include <sys/mman.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <new>

#include "team.h"

namespace dovetail {

namespace {

using Clock = std::chrono::steady_clock;

uint64_t read(const uint8_t* from, size_t bytes) {
    uint64_t a = 0, b = 0, c = 0, d = 0;
    for (size_t at = 0; at < bytes; at += 64) {  // a word of each line: the line is what is moved
        __builtin_prefetch(from + at + 4096);
        uint64_t x[4];
        memcpy(x, from + at, 32);
        a += x[0], b += x[1], c += x[2], d += x[3];
    }
    return a + b + c + d;
}

}  // namespace

double read_bandwidth(size_t bytes, int threads) {
    bytes = bytes / 4096 * 4096;
    auto* p = (uint8_t*)mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    madvise(p, bytes, MADV_HUGEPAGE);
    const size_t each = bytes / threads / 512 * 512;
    double best = 0;
    std::atomic<uint64_t> sink{0};
    Team team(threads, 1);
    team.run([&](Member& member) { member.share(threads, [&](int i) { memset(p + i * each, 1, each); }); });
    for (int i = 0; i < 3; i++) {
        const auto start = Clock::now();
        team.run([&](Member& member) { member.share(threads, [&](int i) { sink += read(p + i * each, each); }); });
        const std::chrono::duration<double> took = Clock::now() - start;
        const double rate = (double)each * threads / took.count() / 1e9;
        best = rate > best ? rate : best;
    }
    munmap(p, bytes);
    return sink ? best : 0;
}

double run_dots(const Kernels& kernels, int threads) {
    constexpr int COUNT = 1 << 20, OPERATIONS = 16 * 128;  // sixteen dot products of 64 bytes
    std::atomic<int> sink{0};
    Team team(threads, 1);
    team.run([&](Member& member) { member.share(threads, [&](int) { sink += kernels.dots(COUNT); }); });
    return sink ? (double)COUNT * OPERATIONS * threads : 0;
}

}  // namespace dovetail
