#include "pack_grid.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "small_floats.h"

namespace dovetail {

namespace {

// 32 codes of a row into column `lane` of a block.
void place_bytes(const uint8_t* codes, int lane, uint8_t* block) {
    for (int j = 0; j < 8; j++) {
        uint32_t quad;
        memcpy(&quad, codes + 4 * j, 4);
        quad ^= 0x80808080u;  // to unsigned, zero point 128
        memcpy(block + 64 * j + 4 * lane, &quad, 4);
    }
}

void place_nibbles(const uint8_t* codes, int lane, uint8_t* block) {
    uint8_t halves[16];  // codes i and i + 16
    for (int i = 0; i < 8; i++) {
        const uint8_t low = codes[i], high = codes[8 + i];
        halves[2 * i] = (uint8_t)((low & 15) | high << 4), halves[2 * i + 1] = (uint8_t)(low >> 4 | (high & 0xf0));
    }
    for (int j = 0; j < 4; j++) memcpy(block + 64 * j + 4 * lane, halves + 4 * j, 4);
}

void place_pairs(const uint8_t* codes, int lane, uint8_t* block) {
    for (int j = 0; j < 16; j++) memcpy(block + 32 * j + 2 * lane, codes + 2 * j, 2);
}

void place(Format f, const uint8_t* codes, int lane, uint8_t* block) {
    if (f == I8 || f == TENDER8) place_bytes(codes, lane, block);
    else if (f == I4 || f == TENDER4) place_nibbles(codes, lane, block);
    else place_pairs(codes, lane, block);
}

bool is_tender(Format f) { return f == TENDER8 || f == TENDER4; }

const TenderPlan* plan_of(const GridWeight& w) {
    const bool there = is_tender(w.format) && w.shared.size() == NUM_SHARED && w.shared[SIZES].second == sizeof(TenderPlan) / 4;
    return there ? (const TenderPlan*)w.shared[SIZES].first : nullptr;
}

int biases_of(const GridWeight& w) { return w.bias && plan_of(w) ? plan_of(w)->chunks : 0; }

// A bound on the magnitude of a row's integer sums, with all codes of activations at their extreme.
uint64_t highest_sum(const GridWeight& w, const TenderPlan& p, int row) {
    const uint8_t* codes = w.codes + (size_t)row * w.row_bytes;
    uint64_t sum = 0;
    int i = 0;
    for (int g = 0; g < p.groups; g++) {
        sum *= 2;
        for (const int end = i + p.sizes[g]; i < end; i++)
            sum += (uint64_t)std::abs(p.bits == 8 ? (int8_t)codes[i] : (codes[i / 2] >> i % 2 * 4 & 15) - 8);
    }
    return sum << (p.bits - 1);
}

// Whether sums may exceed 32 bits.
bool is_wide(const GridWeight& w) {
    const TenderPlan* p = plan_of(w);
    uint64_t most = 0;
    for (int g = 0; p && g < p->groups; g++) most = 2 * most + (uint64_t)p->sizes[g];
    if (!p || most << 2 * (p->bits - 1) < (uint64_t)1 << 31) return false;  // whatever the codes are
    for (int r = 0; r < w.n; r++)
        if (highest_sum(w, *p, r) >= (uint64_t)1 << 31) return true;
    return false;
}

// A factor and the scales of a row's groups. The largest scale is at least half the factor, and below it.
void place_scales(const GridWeight& w, int row, int lane, uint8_t* tile) {
    const float* scale = w.scale + (size_t)row * w.groups;
    float factor = scale[0];
    if (w.groups > 1 || w.zero) {
        float most = 0;
        for (int g = 0; g < w.groups; g++) most = std::max(most, std::fabs(scale[g]));
        int exponent = 0;
        std::frexp(most, &exponent);
        factor = std::ldexp(1.0f, exponent);
        for (int g = 0; g < w.groups; g++) {
            const uint16_t half = to_half(std::ldexp(scale[g], -exponent));
            memcpy(tile + 64 + 32 * g + 2 * lane, &half, 2);
        }
    }
    memcpy(tile + 4 * lane, &factor, 4);
    const int chunks = biases_of(w);
    for (int c = 0; c < chunks; c++) memcpy(tile + 64 + 64 * c + 4 * lane, w.bias + (size_t)row * chunks + c, 4);
    for (int g = 0; w.zero && g < w.groups; g++)
        tile[64 + 32 * w.groups + 16 * g + lane] = (uint8_t)w.zero[(size_t)row * w.groups + g];
}

// A factor with which the largest scale of a weight is nearly the largest float16.
float factor_of(const GridWeight& w) {
    float most = 0;
    for (int i = 0; i < (w.pairs ? w.n / 2 : w.n) * w.groups; i++) most = std::max(most, std::fabs(w.scale[i]));
    for (int i = 0; w.outlier_scale && i < w.n; i++) most = std::max(most, std::fabs(w.outlier_scale[i]));
    int exponent = 0;
    std::frexp(most, &exponent);
    return std::ldexp(1.0f, exponent - 15);
}

GridShape shape_of(const GridWeight& w) {
    if (w.format == ATOM)
        return {(w.k - w.outliers) / w.groups / BLOCK, 0, w.outliers / BLOCK, w.pairs, factor_of(w)};
    const bool grouped = w.groups > 1 || w.zero;
    return {grouped ? w.k / w.groups / BLOCK : 0, w.zero != nullptr, 0, 0, 1, biases_of(w), is_wide(w)};
}

void check_shape(const GridWeight& w) {
    if (w.n < 1 || w.k < 1 || w.groups < 1) throw std::invalid_argument("a weight must have rows, columns and groups");
    const bool atom = w.format == ATOM, grouped = w.groups > 1 || w.zero || atom;
    if (w.outliers % BLOCK || w.outliers < 0 || w.outliers >= w.k || (w.outliers && (!atom || !w.outlier_scale)) || (atom && w.zero))
        throw std::invalid_argument("outliers must be a multiple of 32 columns of a weight of Atom");
    if (grouped && (w.k - w.outliers) % (BLOCK * w.groups))
        throw std::invalid_argument("groups must be of a multiple of 32 columns");
}

// Codes and scales of a row of ATOM.
void place_mixed(const GridWeight& w, const GridShape& shape, int row, int lane, uint8_t* tile) {
    const int k_blocks = w.k / BLOCK, narrow = k_blocks - shape.outliers, at = w.pairs ? row / 2 : row;
    const uint8_t* codes = w.codes + (size_t)row * w.row_bytes;
    for (int b = 0; b < narrow; b++) place_nibbles(codes + 16 * b, lane, tile + (size_t)256 * b);
    uint8_t* wide = tile + atom_narrow(k_blocks, shape);
    for (int b = 0; b < shape.outliers; b++) place_bytes(codes + 16 * narrow + 32 * b, lane, wide + (size_t)512 * b);
    uint8_t* scales = tile + atom_codes(k_blocks, shape);
    const size_t each = atom_scales(shape);
    for (int g = 0; g < w.groups; g++) {
        const uint16_t half = to_half(w.scale[(size_t)at * w.groups + g] / shape.factor);
        memcpy(scales + each * g + 2 * (w.pairs ? lane / 2 : lane), &half, 2);
    }
    if (!w.outliers) return;
    const uint16_t half = to_half(w.outlier_scale[row] / shape.factor);
    memcpy(scales + each * w.groups + 2 * lane, &half, 2);
}

void check_plan(const GridWeight& w) {
    if (!is_tender(w.format)) {
        if (w.bias) throw std::invalid_argument("only a tender weight has biases by chunk");
        return;
    }
    if (w.activation != "tender" || w.groups != 1 || w.zero || !plan_of(w))
        throw std::invalid_argument("a tender weight takes tender activations, one scale a row and no zero points");
    const TenderPlan& p = *plan_of(w);
    const size_t means = w.shared[MEANS].second, width = (size_t)(w.k + BLOCK - 1) / BLOCK * BLOCK;
    bool sound = p.bits == (w.format == TENDER4 ? 4 : 8) && p.chunk > 0 && p.chunks > 0 && p.groups > 0 &&
                 p.groups <= TENDER_GROUPS && w.shared[SCALES].second == (size_t)p.chunks &&
                 means == (w.bias ? p.chunks * width : 0);
    int64_t codes = 0;
    for (int g = 0; sound && g < p.groups; g++) {
        codes += p.sizes[g];
        sound = p.sizes[g] >= 0 && codes <= w.k && (codes % 4 == 0 || codes == w.k);
    }
    if (!sound || codes != w.k) throw std::invalid_argument("tender's groups, scales and means do not fit the weight");
    for (int c = 0; c < p.chunks; c++) {
        const float scale = ((const float*)w.shared[SCALES].first)[c];
        if (!(scale > 0) || !std::isfinite(1 / scale)) throw std::invalid_argument("a scale of tender is not positive");
    }
}

void check_order(const GridWeight& w) {
    if (w.shared.empty() || !w.shared[ORDER].second) return;
    const auto [order, count] = w.shared[ORDER];
    bool sound = count == (size_t)w.k;
    for (int i = 0; sound && i < w.k; i++) sound = (uint32_t)((const int32_t*)order)[i] < (uint32_t)w.k;
    if (!sound) throw std::invalid_argument("an order must have a number for each column");
}

}  // namespace

std::unique_ptr<GridHeader> header_of(const GridWeight& w) {
    if (!on_grid(w.format)) throw std::invalid_argument("the format is not one of weights on a grid");
    check_shape(w);
    auto h = std::make_unique<GridHeader>();
    if (w.activation.size() >= sizeof h->activation || w.shared.size() > NUM_SHARED)
        throw std::invalid_argument("unknown activations or shared arrays");
    memcpy(h->activation, w.activation.data(), w.activation.size());
    check_order(w), check_plan(w);
    h->shape = shape_of(w);
    for (size_t i = 0; i < w.shared.size(); i++) h->counts[i] = (int32_t)w.shared[i].second;
    return h;
}

void check_values(const GridWeight& w) {
    bool finite = true;
    for (size_t i = 0; i < (size_t)(w.pairs ? w.n / 2 : w.n) * w.groups; i++) finite &= std::isfinite(w.scale[i]);
    for (int i = 0; w.outlier_scale && i < w.n; i++) finite &= std::isfinite(w.outlier_scale[i]);
    if (!finite) throw std::invalid_argument("a scale is not finite");
    for (int r = 0; w.format == F8 && r < w.n; r++) {
        const uint8_t* codes = w.codes + (size_t)r * w.row_bytes;
        bool nan = false;
        for (int i = 0; i < w.k; i++) nan |= (codes[i] & 127) == 127;
        if (nan) throw std::invalid_argument("a value is not a number");
    }
}

void pack_grid_tile(const GridWeight& w, const GridShape& shape, int first, uint8_t* tile) {
    const int rows = std::min(TILE, w.n - first);
    for (int lane = 0; w.format == ATOM && lane < rows; lane++) place_mixed(w, shape, first + lane, lane, tile);
    if (w.format == ATOM) return;
    const int k_blocks = (w.k + BLOCK - 1) / BLOCK, whole = w.k / BLOCK;
    uint8_t* blocks = tile + grid_blocks(k_blocks, shape);
    const int block = FORMATS[w.format].block, stored = block * BLOCK / (2 * 256);
    for (int lane = 0; lane < rows; lane++) {
        const uint8_t* codes = w.codes + (size_t)(first + lane) * w.row_bytes;
        for (int b = 0; b < whole; b++) place(w.format, codes + (size_t)b * stored, lane, blocks + (size_t)b * block);
        if (whole < k_blocks) {  // the rest is met by zeros
            uint8_t rest[BLOCK] = {};
            memcpy(rest, codes + (size_t)whole * stored, (size_t)(w.k % BLOCK) * stored / BLOCK);
            place(w.format, rest, lane, blocks + (size_t)whole * block);
        }
        place_scales(w, first + lane, lane, tile);
    }
}

}  // namespace dovetail
