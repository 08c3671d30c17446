// Rows as integers times scales, for the products of dot.h, and as packed codes.
#pragma once

#include <vector>

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
    for (int64_t i = 0; i < n; ++i) {
        const float v = Op::T::load(x[i]);
        out[i] = static_cast<Code>(static_cast<int32_t>(exact::integer(Op::rounded(v, s, f), f.element, v)));
    }
}

// Turn `count` blocks of `n` elements into integers; they lie `n` apart, and the codes too.
template <class Op, class Code>
void encode_blocks(const Computed<Op>& op, const typename Op::T::Stored* x, int64_t count, int64_t n, Code* codes,
                   float* scales) {
    BlockScales found;
    find_block_scales(op, x, count, n, found);
    for (int64_t b = 0; b < count; ++b) {
        const Scale s{found.down[b], found.up[b]};
        find_integers<Op>(op.format, x + b * n, s, codes + b * n, n);
        scales[b] = found.amax[b] == 0 ? 0.0f : Op::unit(s, op.format);
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

// Put the codes of even elements before those of odd ones, in each 32.
MX_NOINLINE void put_apart(int8_t* codes, int64_t padded) {
    for (int64_t k = 0; k < padded; k += CODES_READ) {
        int8_t found[CODES_READ];
        for (int64_t i = 0; i < CODES_READ; ++i) found[i] = codes[k + i];
        for (int64_t i = 0; i < CODES_READ / 2; ++i) {
            codes[k + i] = found[2 * i];
            codes[k + CODES_READ / 2 + i] = found[2 * i + 1];
        }
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
        if (m.is_apart) put_apart(codes, shape.padded);
    }
}

// Call f with the operation of a type and a rounding.
template <class T, Rounding R, class F>
void with_scaling(Scaling scaling, F f) {
    if (scaling == Scaling::floating) return f(Floating<T, R>{});
    if (scaling == Scaling::searched) return f(Searched<T, R>{});
    f(Exact<T, R>{});
}

// Call f with the operation, for the roundings that draw no random numbers.
template <class F>
void with_operation(Dtype dtype, Scaling scaling, Rounding rounding, F f) {
    with_dtype(dtype, [&](auto t) {
        using T = decltype(t);
        if (scaling == Scaling::asymmetric) return f(Asymmetric<T, Rounding::even>{});
        if (rounding == Rounding::nearest) return with_scaling<T, Rounding::nearest>(scaling, f);
        if (rounding == Rounding::nearest_zero) return with_scaling<T, Rounding::nearest_zero>(scaling, f);
        if (rounding == Rounding::even) return with_scaling<T, Rounding::even>(scaling, f);
        if (rounding == Rounding::floor) return with_scaling<T, Rounding::floor>(scaling, f);
    });
}

void encode(const Buffers& b, const Format& f, Scaling scaling, Rounding rounding, const DotShape& shape,
            const DotMethod& m, int offset, const DotInput& out, int64_t first, int64_t last) {
    with_operation(b.dtype, scaling, rounding,
                   [&](auto op) { encode<decltype(op)>(b, f, shape, m, offset, out, first, last); });
}

template <class Op>
MX_NOINLINE void find_codes(const Format& given, int bits, const typename Op::T::Stored* x, const Scale& s,
                            uint8_t* out, int64_t n) {
    const Format f = given;
    MX_INDEPENDENT
    for (int64_t i = 0; i < n; ++i) {
        const float v = Op::T::load(x[i]);
        out[i] = static_cast<uint8_t>(exact::code(Op::rounded(v, s, f), f.element, bits, v));
    }
}

// The same for `count` blocks of `n` elements; those of a block without a number are 0.
template <class Op>
void find_block_codes(const Computed<Op>& op, const Packing& p, const typename Op::T::Stored* x, int64_t count,
                      int64_t n, uint8_t* codes, uint8_t* scales) {
    BlockScales found;
    find_block_scales(op, x, count, n, found);
    for (int64_t b = 0; b < count; ++b) {
        const Scale s{found.down[b], found.up[b]};
        const bool is_number = s.up == s.up;
        scales[b] = static_cast<uint8_t>(is_number ? Op::scale_code(s, found.amax[b], op.format) : p.nan_scale);
        if (is_number && s.up != 0.0f)
            find_codes<Op>(op.format, p.bits, x + b * n, s, codes + b * n, n);
        else
            for (int64_t i = 0; i < n; ++i) codes[b * n + i] = 0;
    }
}

MX_NOINLINE void pack_four_bits(const uint8_t* codes, uint8_t* out, int64_t pairs) {
    for (int64_t i = 0; i < pairs; ++i) out[i] = static_cast<uint8_t>(codes[2 * i] | codes[2 * i + 1] << 4);
}

// Put codes one behind the other, the first in the lowest bits; `codes` has eight zeros behind its end.
MX_NOINLINE void pack_bits(const uint8_t* codes, int64_t n, int bits, uint8_t* out) {
    if (bits == 4) return pack_four_bits(codes, out, (n + 1) / 2);
    for (int64_t i = 0; i < n; i += 8) {
        u64 eight = 0;
        for (int k = 0; k < 8; ++k) eight |= static_cast<u64>(codes[i + k]) << (k * bits);
        const int64_t left = (n * bits + 7) / 8 - i / 8 * bits, bytes = left < bits ? left : bits;
        for (int64_t k = 0; k < bytes; ++k) out[i / 8 * bits + k] = static_cast<uint8_t>(eight >> (8 * k));
    }
}

template <class Op>
void pack_rows(const Buffers& b, const Format& format, const Packing& p, int64_t first, int64_t last) {
    const Computed<Op> op(format, nullptr);
    const int64_t blocks = (p.length + p.block - 1) / p.block, whole = p.length / p.block, left = p.length % p.block;
    std::vector<uint8_t> codes(static_cast<std::size_t>(p.length) + 8, 0);
    for (int64_t row = first; row < last; ++row) {
        const auto* const x = static_cast<const typename Op::T::Stored*>(b.source) + row * p.length;
        uint8_t* const scales = p.scales + row * blocks;
        for (int64_t k = 0; k < whole; k += BLOCKS)
            find_block_codes(op, p, x + k * p.block, whole - k < BLOCKS ? whole - k : BLOCKS, p.block,
                             codes.data() + k * p.block, scales + k);
        if (left > 0)
            find_block_codes(op, p, x + whole * p.block, 1, left, codes.data() + whole * p.block, scales + whole);
        pack_bits(codes.data(), p.length, p.bits, p.elements + row * p.row_bytes);
    }
}

void pack(const Buffers& b, const Format& f, Scaling scaling, Rounding rounding, const Packing& p, int64_t first,
          int64_t last) {
    with_operation(b.dtype, scaling, rounding, [&](auto op) { pack_rows<decltype(op)>(b, f, p, first, last); });
}

}  // namespace
}  // namespace mx::MX_ISA
