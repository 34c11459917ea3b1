// Which instruction sets this build has and this CPU runs.
#include <cstring>

#include "kernels.h"

namespace dovetail {

const Kernels* kernels_scalar();
#if defined(__x86_64__)
const Kernels* kernels_avx2();
const Kernels* kernels_avx_vnni();
const Kernels* kernels_avx512_vnni();
const Kernels* kernels_avx512_bf16();
#endif

namespace {

struct Isa {
    const char* name;
    const Kernels* (*table)();
    bool (*runs)();
};

bool always() { return true; }

#if defined(__x86_64__)
// The compiler's checks ask the CPU and, for wide registers, the operating system.
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }

bool has_avx_vnni() {
    unsigned a = 7, b, c = 1, d;
    if (!has_avx2()) return false;
    __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    return a >> 4 & 1;
}

bool has_avx512_vnni() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni");
}

bool has_avx512_bf16() { return has_avx512_vnni() && __builtin_cpu_supports("avx512bf16"); }
#endif

const Isa ISAS[] = {  // best first
#if defined(__x86_64__)
    {"avx512_bf16", kernels_avx512_bf16, has_avx512_bf16},
    {"avx512_vnni", kernels_avx512_vnni, has_avx512_vnni},
    {"avx_vnni", kernels_avx_vnni, has_avx_vnni},
    {"avx2", kernels_avx2, has_avx2},
#endif
    {"scalar", kernels_scalar, always},
};

}  // namespace

const Kernels* kernels(const char* name) {
    for (const Isa& isa : ISAS)
        if (!strcmp(isa.name, name)) return isa.runs() ? isa.table() : nullptr;
    return nullptr;
}

const Kernels* best_kernels() {
    for (const Isa& isa : ISAS)
        if (isa.runs()) return isa.table();
    return nullptr;
}

const char* isa_name(int i) { return i < (int)(sizeof ISAS / sizeof *ISAS) ? ISAS[i].name : nullptr; }

}  // namespace dovetail
