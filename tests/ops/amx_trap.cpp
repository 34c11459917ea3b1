// Runs the table of csrc/isa_amx.cpp as it is compiled on a CPU without tile registers: each tile instruction is an
// illegal one there, whose handler decodes it by Intel's manual and carries it out on the emulated registers.
// Prints how many it carried out; 1 if a product differs from the vectors' bits, 2 at an instruction it does not know.
#include "simd/avx512.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <signal.h>
#include <ucontext.h>
#include <vector>

#include "kernels/linear.h"
#include "kernels/rows.h"
#include "simd/amx_emulated.h"

namespace dovetail {
const Kernels* kernels_amx(const Kernels& base);
}

using namespace dovetail;

namespace {

long carried_out = 0;

struct Operands {
    const greg_t* regs;
    const uint8_t* at;  // behind the opcode
    int prefix, r, x, b, v;

    greg_t reg(int number) const {
        static const int ORDER[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                    REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
        return regs[ORDER[number]];
    }
    int mod() const { return at[0] >> 6; }
    int field() const { return (at[0] >> 3 & 7) | r << 3; }
    int rm() const { return (at[0] & 7) | (mod() == 3 ? b << 3 : 0); }
    bool sib() const { return mod() != 3 && rm() == 4; }
    int length() const {
        const bool wide = mod() == 2 || (mod() == 0 && (sib() ? (at[1] & 7) == 5 : rm() == 5));
        return 1 + sib() + (wide ? 4 : mod() == 1);
    }
    uint8_t* address() const {  // without the index, which is a stride
        const int base = sib() ? at[1] & 7 : rm();
        int32_t far = 0;
        if (length() >= 5) memcpy(&far, at + 1 + sib(), 4);
        else if (mod() == 1) far = (int8_t)at[1 + sib()];
        if (mod() == 0 && base == 5) return (uint8_t*)(sib() ? 0 : at + length()) + far;
        return (uint8_t*)reg(base | b << 3) + far;
    }
    size_t stride() const {
        const int index = (at[1] >> 3 & 7) | x << 3;
        return index == 4 ? 0 : (size_t)reg(index) << (at[1] >> 6);
    }
};

enum { NONE, OPERAND_SIZE, REP, REPNE };  // what a VEX prefix implies

bool carry_out(int opcode, const Operands& o) {
    const bool registers = o.mod() == 3;
    if (opcode == 0x49 && o.prefix == NONE && o.at[0] == 0xc0) tile_release();
    else if (opcode == 0x49 && o.prefix == NONE && !registers && o.field() == 0)
        tile_configure(*(const TileShapes*)o.address());
    else if (opcode == 0x49 && o.prefix == REPNE && registers && o.rm() == 0)
        memset(emulated_tile(o.field()), 0, 16 * 64);
    else if (opcode == 0x4b && o.prefix == REPNE && o.sib()) emulated_load(o.field(), o.address(), o.stride());
    else if (opcode == 0x4b && o.prefix == REP && o.sib()) emulated_store(o.field(), o.address(), o.stride());
    else if (opcode == 0x5e && o.prefix == REPNE && registers) emulated_dot(o.field(), o.rm(), o.v);
    else if (opcode == 0x5c && o.prefix == REP && registers) emulated_dot_bf16(o.field(), o.rm(), o.v);
    else return false;
    return true;
}

void trap(int, siginfo_t*, void* context) {
    greg_t* regs = ((ucontext_t*)context)->uc_mcontext.gregs;
    const uint8_t* at = (const uint8_t*)regs[REG_RIP];
    const int inverted = ~at[1], v = ~at[2] >> 3 & 15;
    const Operands o{regs, at + 4, at[2] & 3, inverted >> 7 & 1, inverted >> 6 & 1, inverted >> 5 & 1, v};
    // Three-byte VEX, second map, W and L zero.
    if (at[0] != 0xc4 || (at[1] & 31) != 2 || (at[2] & 0x84) || !carry_out(at[3], o)) {
        fprintf(stderr, "unknown instruction %02x %02x %02x %02x %02x\n", at[0], at[1], at[2], at[3], at[4]);
        _exit(2);
    }
    regs[REG_RIP] += 4 + o.length();
    carried_out++;
}

// Weights and rows of random bits.
struct Product {
    Product(const Kernels& base, Format f, Activation a, int blocks, int rows, int tiles, std::mt19937& random)
        : format(f), activation(a), blocks(blocks), row_count(rows), tiles(tiles), stride(tile_bytes(f, blocks)),
          row_stride(activation_bytes(a, blocks)), weights(tiles * stride), x(rows * row_stride) {
        std::normal_distribution<float> normal;
        std::vector<float> values(blocks * 32);
        for (uint8_t& w : weights) w = (uint8_t)random();
        for (int r = 0; r < rows; r++) {
            for (float& v : values) v = normal(random);
            base.activate[a]({values.data(), blocks, x.data() + r * row_stride, 0, nullptr});
        }
        for (size_t i = 0; f == BF16 && i < weights.size(); i += 2 * values.size()) {  // numbers of no great range
            for (float& v : values) v = normal(random);
            base.to_bf16(values.data(), (int)values.size(), (uint16_t*)(weights.data() + i));
        }
    }
    std::vector<float> by(Gemm gemm, int some, int count, bool add) const {
        std::vector<float> out((size_t)row_count * tiles * 16, 3.0f);
        for (int r = 0; r < row_count; r += some)
            for (int t = 0; t < tiles; t += count)
                gemm({weights.data() + t * stride, stride, blocks, x.data() + r * row_stride, row_stride,
                      out.data() + (r * tiles + t) * 16, tiles * 16, add, weights.data(), 0, some, count});
        return out;
    }

    const Format format;
    const Activation activation;
    const int blocks, row_count, tiles;
    const size_t stride, row_stride;
    std::vector<uint8_t> weights, x;
};

bool same(const std::vector<float>& a, const std::vector<float>& b) {
    for (size_t i = 0; i < a.size(); i++)
        if (memcmp(&a[i], &b[i], 4) && !(a[i] != a[i] && b[i] != b[i])) return false;
    return true;
}

void check(const Kernels& base, const Kernels& amx, Format f, Activation a) {
    std::mt19937 random(f);
    for (int rows : {9, 10, 11, 12, 13, 16, 23, 32, 36, 37, 48})
        for (int tiles = 1; tiles <= 2; tiles++)
            for (int blocks : {8, 16, 1, 9}) {
                if (rows > amx.many[f][a].rows || blocks % FORMATS[f].blocks) continue;
                const Product p(base, f, a, blocks, rows, tiles, random);
                const auto got = p.by(amx.tall[f][a], rows, tiles, rows % 2);
                // Vectors add bfloat16 in another order: each row alone, by tiles.
                const auto want = p.by((a == INT8 ? base : amx).gemm[f][a][1][1], 1, 1, rows % 2);
                if (same(got, want)) continue;
                printf("%s, %d rows, %d tiles, %d blocks: other bits\n", FORMATS[f].name, rows, tiles, blocks);
                exit(1);
            }
}

}  // namespace

int main() {
    struct sigaction action = {};
    action.sa_sigaction = trap, action.sa_flags = SA_SIGINFO;
    sigaction(SIGILL, &action, nullptr);
    static Kernels base = {};
    add_block<1, 1>(base), add_rows_of(base);
    const Kernels* amx = kernels_amx(base);
    if (!amx) return puts("refused"), 1;
    for (Format f : {Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K, Q3_K, IQ4_NL, IQ4_XS, MXFP4})
        check(base, *amx, f, INT8);
    check(base, *amx, BF16, BFLOAT);
    printf("%ld tile instructions\n", carried_out);
}
