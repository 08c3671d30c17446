// The CPU kernels, compiled once per instruction set, with MX_ISA its name: plain loops over the code of ops.h, written
// so that compilers turn them into vector code.
#include "kernels.h"

#include "columns.h"
#include "elementwise.h"
#include "gptq.h"
#include "integers.h"
#include "rows.h"
#include "transform.h"

namespace mx {
namespace MX_ISA {
namespace {

constexpr int64_t UNIT = 8192;  // elements of a unit of work, roughly

int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Return the layout with blocks no longer than the axis and, where blocks fill the rows, all rows as one.
Layout simplified(Layout l) {
    if (l.block > l.axis) l.block = l.axis;
    if (l.block == 1) return {1, 1, l.outer * l.axis * l.inner, 1};  // every element is a block: do them side by side
    if (l.inner == 1 && l.axis % l.block == 0) return {1, l.outer * l.axis, 1, l.block};
    return l;
}

// Return how many blocks along the axis make a unit of work.
int64_t blocks_per_unit(const Layout& l) {
    const int64_t elements = l.inner == 1 ? l.block : l.block * (l.inner < LANES ? l.inner : LANES);
    return elements < UNIT ? UNIT / elements : 1;
}

// Return how many units make up a row, or a column of blocks.
int64_t units_along_axis(const Layout& l) { return divided_up(divided_up(l.axis, l.block), blocks_per_unit(l)); }

int64_t quantize_units(const Layout& given) {
    const Layout l = simplified(given);
    return l.outer * units_along_axis(l) * divided_up(l.inner, LANES);
}

// Quantize units [first, last).
template <class Op>
void quantize(const Buffers& buffers, const Layout& given, const Format& format, const u32* table, int64_t first,
              int64_t last) {
    using Stored = typename Op::T::Stored;
    const Op op(format, table);
    const Layout l = simplified(given);
    const int64_t per_unit = blocks_per_unit(l), along_axis = units_along_axis(l), across = divided_up(l.inner, LANES);
    for (int64_t unit = first; unit < last; ++unit) {
        const int64_t lane = unit % across * LANES, start = unit / across % along_axis * per_unit * l.block;
        const int64_t offset = (unit / across / along_axis * l.axis + start) * l.inner + lane;
        const int64_t n = l.axis - start < per_unit * l.block ? l.axis - start : per_unit * l.block;
        const Stored* const x = static_cast<const Stored*>(buffers.source) + offset;
        Stored* const out = static_cast<Stored*>(buffers.target) + offset;
        const float* const noise = buffers.noise ? buffers.noise + offset : nullptr;
        if (l.inner == 1) {
            row(op, x, out, noise, n, l.block);
            continue;
        }
        const int64_t lanes = l.inner - lane < LANES ? l.inner - lane : LANES;
        for (int64_t r = 0; r < n; r += l.block) {
            const int64_t rows = n - r < l.block ? n - r : l.block, skip = r * l.inner;
            columns(op, x + skip, out + skip, noise ? noise + skip : nullptr, rows, lanes, l.inner);
        }
    }
}

void quantize_exact(const Buffers& b, const Layout& l, const Format& f, Scaling scaling, Rounding rounding,
                    int64_t first, int64_t last) {
    const auto run = [&](auto op) { quantize<Computed<decltype(op)>>(b, l, f, nullptr, first, last); };
    with_dtype(b.dtype, [&](auto t) {
        using T = decltype(t);
        if (scaling == Scaling::asymmetric) return run(Asymmetric<T, Rounding::even>{});
        with_rounding(rounding, [&](auto r) {
            constexpr Rounding R = decltype(r)::value;
            if (scaling == Scaling::floating) return run(Floating<T, R>{});
            if constexpr (R != Rounding::dither) {
                if (scaling == Scaling::searched) return run(Searched<T, R>{});
            }
            run(Exact<T, R>{});
        });
    });
}

void quantize_microxcaling(const Buffers& b, const Layout& l, const Format& f, Rounding rounding, const u32* table,
                           int64_t first, int64_t last) {
    with_dtype(b.dtype, [&](auto t) {
        using T = decltype(t);
        if constexpr (sizeof(typename T::Stored) == 2) {
            if (table) return quantize<LookedUp<T>>(b, l, f, table, first, last);
        }
        with_rounding(rounding, [&](auto r) {
            constexpr Rounding R = decltype(r)::value;
            if constexpr (is_microxcalings(R)) quantize<Computed<Microxcaling<T, R>>>(b, l, f, nullptr, first, last);
        });
    });
}

u32 largest_finite(const Buffers& b, int64_t first, int64_t last) {
    u32 found = 0;
    with_dtype(b.dtype, [&](auto t) {
        using T = decltype(t);
        found = largest_finite<T>(static_cast<const typename T::Stored*>(b.source) + first, last - first);
    });
    return found;
}

}  // namespace
}  // namespace MX_ISA

#define MX_NAME_(isa) isa##_kernels
#define MX_NAME(isa) MX_NAME_(isa)
#define MX_TEXT_(isa) #isa
#define MX_TEXT(isa) MX_TEXT_(isa)

const Kernels MX_NAME(MX_ISA) = {
    MX_TEXT(MX_ISA),         MX_ISA::quantize_units, MX_ISA::quantize_exact,     MX_ISA::quantize_microxcaling,
    MX_ISA::largest_finite,  MX_ISA::round_alone,    MX_ISA::microxcaling_table, MX_ISA::look_up,
    MX_ISA::uniform_numbers, MX_ISA::transform,      MX_ISA::settle_units,       MX_ISA::settle,
    MX_ISA::encode,          MX_ISA::pack,
};

}  // namespace mx
