// Vectors that begin on a cache line.
#pragma once
#include <cstdlib>
#include <new>
#include <vector>

namespace dovetail {

template <class T> struct CacheLines {
    using value_type = T;
    CacheLines() = default;
    template <class U> CacheLines(const CacheLines<U>&) {}
    T* allocate(size_t n) {
        void* p = std::aligned_alloc(64, (n * sizeof(T) + 63) / 64 * 64);
        if (!p) throw std::bad_alloc();
        return (T*)p;
    }
    void deallocate(T* p, size_t) { std::free(p); }
    bool operator==(const CacheLines&) const { return true; }
    bool operator!=(const CacheLines&) const { return false; }
};

template <class T> using Aligned = std::vector<T, CacheLines<T>>;

}  // namespace dovetail
