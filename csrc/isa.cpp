// Which instruction sets this build has and this CPU runs.
#include <cstring>

#if defined(DOVETAIL_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "kernels.h"

namespace dovetail {

const Kernels* kernels_scalar();
#if defined(__x86_64__)
const Kernels* kernels_avx2();
const Kernels* kernels_avx_vnni();
const Kernels* kernels_avx512_vnni();
const Kernels* kernels_avx512_bf16();
const Kernels* kernels_amx_emulated(const Kernels& base);
#endif
#if defined(DOVETAIL_AMX)
const Kernels* kernels_amx(const Kernels& base);
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

#if defined(DOVETAIL_AMX)
struct Registers {
    unsigned a, b, c, d;
};

Registers cpuid(unsigned leaf, unsigned sub) {
    Registers r{leaf, 0, sub, 0};
    __asm__("cpuid" : "+a"(r.a), "=b"(r.b), "+c"(r.c), "=d"(r.d));
    return r;
}

// Linux gives a process tile registers on demand only; threads and forks of it then have them too.
bool permitted() {
    constexpr long REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    static const bool answer = syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
    return answer;
}

bool has_amx() {
    if (!has_avx512_bf16() || cpuid(0, 0).a < 0x1d) return false;
    constexpr unsigned BF16 = 1u << 22, TILE = 1u << 24, INT8 = 1u << 25, WANTED = BF16 | TILE | INT8;
    unsigned low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    if ((cpuid(7, 0).d & WANTED) != WANTED || (low >> 17 & 3) != 3) return false;
    // A hypervisor may show the bits and no palette: any tile instruction is a fault then.
    const Registers palette = cpuid(0x1d, 1);
    const bool shaped = cpuid(0x1d, 0).a >= 1 && palette.b >> 16 >= 8 && (palette.b & 0xffff) >= 64 &&
                        (palette.c & 0xffff) >= 16;
    return shaped && permitted();
}

const Kernels* table_amx() { return kernels_amx(*kernels_avx512_bf16()); }
#endif

const Isa ISAS[] = {  // best first
#if defined(DOVETAIL_AMX)
    {"amx", table_amx, has_amx},
#endif
#if defined(__x86_64__)
    {"avx512_bf16", kernels_avx512_bf16, has_avx512_bf16},
    {"avx512_vnni", kernels_avx512_vnni, has_avx512_vnni},
    {"avx_vnni", kernels_avx_vnni, has_avx_vnni},
    {"avx2", kernels_avx2, has_avx2},
#endif
    {"scalar", kernels_scalar, always},
};

#if defined(__x86_64__)
const Kernels* table_amx_emulated() {
    for (const Isa& isa : ISAS)
        if (strcmp(isa.name, "amx") && isa.runs()) return kernels_amx_emulated(*isa.table());
    return nullptr;
}
#endif

const Isa EMULATED[] = {
#if defined(__x86_64__)
    {"amx_emulated", table_amx_emulated, has_avx2},
#endif
    {nullptr, nullptr, nullptr},
};

}  // namespace

const Kernels* kernels(const char* name) {
    for (const Isa& isa : ISAS)
        if (!strcmp(isa.name, name)) return isa.runs() ? isa.table() : nullptr;
    for (const Isa* isa = EMULATED; isa->name; isa++)
        if (!strcmp(isa->name, name)) return isa->runs() ? isa->table() : nullptr;
    return nullptr;
}

const Kernels* best_kernels() {
    for (const Isa& isa : ISAS) {
        const Kernels* table = isa.runs() ? isa.table() : nullptr;
        if (table) return table;
    }
    return nullptr;
}

const char* isa_name(int i) { return i < (int)(sizeof ISAS / sizeof *ISAS) ? ISAS[i].name : nullptr; }
const char* emulated_name(int i) { return EMULATED[i].name; }

}  // namespace dovetail
