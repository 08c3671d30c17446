// Products of activations with packed weights, compiled once per instruction set, with MX_ISA its name: see dot.h.
#include "dot.h"

#include <numeric>

#include "attend.h"
#include "one_row.h"
#include "tiles.h"
#include "unpack.h"
#include "values.h"

namespace mx {
namespace MX_ISA {
namespace {

// Return how many codes are unpacked at once: whole blocks, and bytes.
int64_t codes_at_once(const DotShape& s, int code_bytes) {
    const int64_t unit = std::lcm(s.block, CODES_READ);
    const int64_t most = MOST_CODES / code_bytes / unit * unit;
    return most < s.padded ? most : s.padded;
}

template <class T>
void store_rows(const float (*sums)[PANEL], const DotOutput& out, int64_t row, int64_t rows, int64_t output,
                int64_t outputs) {
    using Stored = typename T::Stored;
    const Stored* const bias = static_cast<const Stored*>(out.bias);
    Stored* const target = static_cast<Stored*>(out.target) + row * outputs + output;
    const int64_t n = outputs - output < PANEL ? outputs - output : PANEL;
    float added[PANEL] = {};
    if (bias)
        for (int64_t c = 0; c < n; ++c) added[c] = T::load(bias[output + c]);
    for (int64_t r = 0; r < rows; ++r) {
        Stored made[PANEL];
        for (int64_t c = 0; c < PANEL; ++c) made[c] = T::store(bias ? sums[r][c] + added[c] : sums[r][c]);
        if (n == PANEL)
            std::memcpy(target + r * outputs, made, sizeof made);
        else
            std::memcpy(target + r * outputs, made, n * sizeof(Stored));
    }
}

// Multiply rows by codes [first, first + count) of a panel, and add the products to the sums.
void add_products(const DotMethod& m, const DotShape& s, const DotInput& in, int64_t row, int64_t rows, int64_t first,
                  int64_t count, const uint8_t* panel, const float* scales, float (*sums)[PANEL]) {
    Tile tile{panel, scales, nullptr, nullptr, nullptr, s.padded * m.code_bytes, s.padded / s.block, 0, 0, s.block / 4};
    tile.blocks = count / s.block;
    tile.start_stride = in.starts ? s.padded / (4 * m.steps) : 0;
    for (int64_t r = 0; r < rows;) {
        tile.codes = static_cast<const uint8_t*>(in.codes) + (row + r) * tile.code_stride + first * m.code_bytes;
        tile.scales = in.scales + (row + r) * tile.scale_stride + first / s.block;
        if (in.starts) tile.starts = in.starts + (row + r) * tile.start_stride + first / (4 * m.steps);
        const int64_t together = rows_done(rows - r);
        multiply_rows(tile, m, together, sums[r]);
        r += together;
    }
}

DotMethod method(const DotElement& e, int weight, int input, const DotShape& s) {
    const DotMethod of_one_row = method_of_one_row(e, weight, input, s);
    return of_one_row.is_one_row ? of_one_row : method_of_tiles(e, weight, input, s.block);
}

void multiply(const DotWeight& w, const DotElement& e, const DotMethod& m, const DotShape& s, const DotInput& in,
              const DotOutput& out, int64_t panel, int64_t first, int64_t last) {
    alignas(64) uint8_t unpacked[MOST_CODES * PANEL];
    alignas(64) float scales[MOST_CODES / 4 * PANEL];
    alignas(64) float sums[MOST_ROWS][PANEL];
    const int64_t output = panel * PANEL, rows = last - first, together = codes_at_once(s, m.code_bytes);
    std::memset(sums, 0, rows * sizeof sums[0]);
    for (int64_t k = 0; k < s.padded; k += together) {
        const int64_t count = s.padded - k < together ? s.padded - k : together;
        find_weight_scales(w, s, output, k / s.block, count / s.block, scales);
        if (m.is_one_row) {
            add_one_row(w, e, m, s, in, output, k, count, scales, sums[0]);
        } else {
            unpack(w, e, m.code_bytes, output, k, count, unpacked);
            add_products(m, s, in, first, rows, k, count, unpacked, scales, sums);
        }
    }
    with_dtype(out.dtype, [&](auto t) { store_rows<decltype(t)>(sums, out, first, rows, output, w.outputs); });
}

}  // namespace
}  // namespace MX_ISA

#define MX_NAME_(isa) isa##_dot
#define MX_NAME(isa) MX_NAME_(isa)

const DotKernels MX_NAME(MX_ISA) = {MX_ISA::method, MX_ISA::multiply, MX_ISA::values, MX_ISA::score, MX_ISA::mix};

}  // namespace mx
