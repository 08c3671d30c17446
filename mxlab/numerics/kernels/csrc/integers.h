// Rows of an activation as integers times scales, for the products of dot.h.
#pragma once

#include "dot.h"
#include "elements.h"
#include "rows.h"
#include "scales.h"

namespace mx::MX_ISA {
namespace {

template <class Op, class Code>
MX_NOINLINE void find_integers(const Format& given, const typename Op::T::Stored* x, const Scale& s, Code* out,
                               int64_t n) {
    const Format f = given;
    MX_INDEPENDENT
    for (int64_t i = 0; i < n; ++i)
        out[i] = static_cast<Code>(static_cast<int32_t>(Op::integer(Op::T::load(x[i]), s, f)));
}

// Turn `count` blocks of `n` elements into integers; they lie `n` apart, and the codes too.
template <class Op, class Code>
void encode_blocks(const Computed<Op>& op, const typename Op::T::Stored* x, int64_t count, int64_t n, Code* codes,
                   float* scales) {
    u32 amax[BLOCKS];
    float down[BLOCKS], up[BLOCKS];
    for (int64_t b = 0; b < count; ++b) amax[b] = largest<typename Op::T>(x + b * n, n);
    find_scales<Op>(op.format, amax, down, up, count);
    if constexpr (Op::SEARCHES) search_rows(op, x, count, n, down, up);
    for (int64_t b = 0; b < count; ++b) {
        const Scale s{down[b], up[b]};
        find_integers<Op>(op.format, x + b * n, s, codes + b * n, n);
        scales[b] = amax[b] == 0 ? 0.0f : Op::unit(s, op.format);
    }
}

template <class Op, class Code>
void encode_row(const Computed<Op>& op, const DotShape& shape, const typename Op::T::Stored* x, Code* codes,
                float* scales) {
    const int64_t whole = shape.inputs / shape.block, left = shape.inputs % shape.block;
    for (int64_t b = 0; b < whole; b += BLOCKS) {
        const int64_t start = b * shape.block, count = whole - b < BLOCKS ? whole - b : BLOCKS;
        encode_blocks(op, x + start, count, shape.block, codes + start, scales + b);
    }
    if (left > 0) encode_blocks(op, x + whole * shape.block, 1, left, codes + whole * shape.block, scales + whole);
    for (int64_t i = shape.inputs; i < shape.padded; ++i) codes[i] = 0;
    for (int64_t b = shape.blocks(); b < shape.padded / shape.block; ++b) scales[b] = 0.0f;
}

// Find what the sums of a row start with.
MX_NOINLINE void find_starts(const int8_t* codes, int64_t padded, const DotMethod& m, int offset, int32_t* starts) {
    const int64_t n = 4 * m.steps;
    for (int64_t k = 0; k < padded; k += n, ++starts) {
        int32_t low = 0, high = 0;
        for (int64_t i = 0; i < n; i += 4) {
            low += codes[k + i] + codes[k + i + 1];
            high += codes[k + i + 2] + codes[k + i + 3];
        }
        if (m.starts == Starts::whole)
            *starts = -offset * (low + high);
        else  // modulo 2^16, as the sums themselves
            *starts = static_cast<int32_t>((static_cast<u32>(-offset * low) & 0xFFFFu) |
                                           static_cast<u32>(-offset * high) << 16);
    }
}

template <class Op>
void encode(const Buffers& b, const Format& format, const DotShape& shape, const DotMethod& m, int offset,
            const DotInput& out, int64_t first, int64_t last) {
    const Computed<Op> op(format, nullptr);
    const int64_t per_row = m.starts == Starts::none ? 0 : shape.padded / (4 * m.steps);
    for (int64_t row = first; row < last; ++row) {
        const auto* const x = static_cast<const typename Op::T::Stored*>(b.source) + row * shape.inputs;
        float* const scales = out.scales + row * (shape.padded / shape.block);
        if (m.code_bytes == 2) {
            encode_row(op, shape, x, static_cast<int16_t*>(out.codes) + row * shape.padded, scales);
            continue;
        }
        int8_t* const codes = static_cast<int8_t*>(out.codes) + row * shape.padded;
        encode_row(op, shape, x, codes, scales);
        if (per_row > 0) find_starts(codes, shape.padded, m, offset, out.starts + row * per_row);
    }
}

void encode(const Buffers& b, const Format& f, Scaling scaling, Rounding rounding, const DotShape& shape,
            const DotMethod& m, int offset, const DotInput& out, int64_t first, int64_t last) {
    const auto run = [&](auto op) { encode<decltype(op)>(b, f, shape, m, offset, out, first, last); };
    with_dtype(b.dtype, [&](auto t) {
        using T = decltype(t);
        if (scaling == Scaling::asymmetric) return run(Asymmetric<T, Rounding::even>{});
        with_rounding(rounding, [&](auto r) {
            constexpr Rounding R = decltype(r)::value;
            if constexpr (R != Rounding::dither) {
                if (scaling == Scaling::floating) return run(Floating<T, R>{});
                if (scaling == Scaling::searched) return run(Searched<T, R>{});
                run(Exact<T, R>{});
            }
        });
    });
}

}  // namespace
}  // namespace mx::MX_ISA
