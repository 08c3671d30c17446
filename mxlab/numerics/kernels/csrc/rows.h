// Blocks along the last axis, on the CPU.
#pragma once

#include "elements.h"
#include "scales.h"

namespace mx::MX_ISA {
namespace {

// A search adds up the squared errors of a block in index order, which takes one addition after the other: INTERLEAVE
// blocks take turns, in chunks of ERRORS elements.
constexpr int64_t INTERLEAVE = 8, ERRORS = 128;

struct Errors {
    float squares[INTERLEAVE][ERRORS];
    float sums[INTERLEAVE];

    void add_up(int64_t n) {
        for (int64_t i = 0; i < n; ++i)
            for (int64_t b = 0; b < INTERLEAVE; ++b) sums[b] += squares[b][i];
    }
};

template <class Op, class Stored>
MX_INLINE void squared_errors(const Op& op, const Stored* x, int64_t n, const Scale& s, float* squares) {
    const Format f = op.format;
    for (int64_t i = 0; i < n; ++i) {
        const float v = Op::T::load(x[i]);
        squares[i] = exact::squared(v - Op::in_range(Op::element(v, s, f, 0.0f)));
    }
}

// Replace the scales of blocks for which the next power of two has the smaller sum of squared errors.
template <class Op, class Stored>
MX_NOINLINE void search_rows(const Op& op, const Stored* x, int64_t count, int64_t n, float* down, float* up) {
    Errors errors{}, next_errors{};
    for (int64_t first = 0; first < count; first += INTERLEAVE) {
        const int64_t blocks = count - first < INTERLEAVE ? count - first : INTERLEAVE;
        Scale next[INTERLEAVE];
        for (int64_t b = 0; b < INTERLEAVE; ++b) errors.sums[b] = next_errors.sums[b] = 0.0f;
        for (int64_t b = 0; b < blocks; ++b) next[b] = exact::next_scale({down[first + b], up[first + b]}, op.format);
        for (int64_t start = 0; start < n; start += ERRORS) {
            const int64_t length = n - start < ERRORS ? n - start : ERRORS;
            for (int64_t b = 0; b < blocks; ++b) {
                const Stored* const from = x + (first + b) * n + start;
                squared_errors(op, from, length, {down[first + b], up[first + b]}, errors.squares[b]);
                squared_errors(op, from, length, next[b], next_errors.squares[b]);
            }
            errors.add_up(length);
            next_errors.add_up(length);
        }
        for (int64_t b = 0; b < blocks; ++b) {
            if (!(next_errors.sums[b] < errors.sums[b])) continue;
            down[first + b] = next[b].down;
            up[first + b] = next[b].up;
        }
    }
}

// Write each of `n` values `copies` times.
MX_INLINE void repeat_each(const float* value, float* out, int64_t n, int64_t copies) {
    for (int64_t b = 0; b < n; ++b)
        for (int64_t i = 0; i < copies; ++i) out[b * copies + i] = value[b];
}

MX_NOINLINE void repeat(const float* __restrict value, float* __restrict out, int64_t n, int64_t copies) {
    if (copies == 4) return repeat_each(value, out, n, 4);
    if (copies == 8) return repeat_each(value, out, n, 8);
    if (copies == 16) return repeat_each(value, out, n, 16);
    repeat_each(value, out, n, copies);
}

// Quantize `count` blocks of `n` elements, a loop for each block.
template <class Op, class Stored>
MX_INLINE void long_blocks(const Op& op, const Stored* x, Stored* out, const float* noise, int64_t count, int64_t n,
                           const float* down, const float* up) {
    for (int64_t b = 0; b < count; ++b, x += n, out += n, noise += noise ? n : 0) {
        const Broadcast d{down[b]}, u{up[b]};
        if constexpr (Op::PACKED_PAIRS) {
            if (n % 2 == 0) {
                if (op.is_exact(up[b]))
                    pairs<true>(op, x, out, noise, n / 2, d, u);
                else
                    pairs<false>(op, x, out, noise, n / 2, d, u);
                continue;
            }
        }
        elements(op, x, out, noise, n, d, u);
    }
}

// Quantize `count` blocks of `n` elements, several blocks a loop: each element (or pair) has its own copy of the scale.
template <class Op, class Stored>
MX_INLINE void short_blocks(const Op& op, const Stored* x, Stored* out, const float* noise, int64_t count, int64_t n,
                            const float* down, const float* up) {
    constexpr int64_t CHUNK = 1024;
    float downs[CHUNK], ups[CHUNK];
    const bool paired = Op::PACKED_PAIRS && n % 2 == 0;
    const int64_t copies = paired ? n / 2 : n, step = CHUNK / copies;
    for (int64_t first = 0; first < count; first += step) {
        const int64_t blocks = count - first < step ? count - first : step;
        int all_exact = 1;
        for (int64_t b = 0; b < blocks; ++b) all_exact &= op.is_exact(up[first + b]);
        repeat(down + first, downs, blocks, copies);
        repeat(up + first, ups, blocks, copies);
        const Stored* const from = x + first * n;
        Stored* const to = out + first * n;
        const float* const u = noise ? noise + first * n : nullptr;
        if constexpr (Op::PACKED_PAIRS) {
            if (paired) {
                if (all_exact)
                    pairs<true>(op, from, to, u, blocks * copies, &downs[0], &ups[0]);
                else
                    pairs<false>(op, from, to, u, blocks * copies, &downs[0], &ups[0]);
                continue;
            }
        }
        elements(op, from, to, u, blocks * n, &downs[0], &ups[0]);
    }
}

// What the blocks that are done together have.
struct BlockScales {
    u32 amax[BLOCKS];
    float down[BLOCKS], up[BLOCKS];
};

// Find the scales of `count` whole blocks of `n` elements, one behind the other.
template <class Op, class Stored>
MX_INLINE void find_block_scales(const Op& op, const Stored* x, int64_t count, int64_t n, BlockScales& s) {
    for (int64_t b = 0; b < count; ++b) s.amax[b] = largest<typename Op::T>(x + b * n, n);
    find_scales<Op>(op.format, s.amax, s.down, s.up, count);
    if constexpr (Op::SEARCHES) search_rows(op, x, count, n, s.down, s.up);
}

// Quantize such blocks.
template <class Op, class Stored>
MX_INLINE void row_blocks(const Op& op, const Stored* x, Stored* out, const float* noise, int64_t count, int64_t n) {
    BlockScales s;
    find_block_scales(op, x, count, n, s);
    if (n < Op::MIN_LOOP_BLOCK)
        short_blocks(op, x, out, noise, count, n, s.down, s.up);
    else
        long_blocks(op, x, out, noise, count, n, s.down, s.up);
}

// Quantize `n` consecutive elements of a row, cut into blocks of `block`. The usual block sizes are constants to the
// compiler.
template <class Op, class Stored>
void row(const Op& op, const Stored* x, Stored* out, const float* noise, int64_t n, int64_t block) {
    while (n > 0) {
        const int64_t count = n < block ? 1 : n / block < BLOCKS ? n / block : BLOCKS;
        const int64_t length = n < block ? n : block;
        if (length == 8)
            row_blocks(op, x, out, noise, count, 8);
        else if (length == 16)
            row_blocks(op, x, out, noise, count, 16);
        else if (length == 32)
            row_blocks(op, x, out, noise, count, 32);
        else if (length == 64)
            row_blocks(op, x, out, noise, count, 64);
        else
            row_blocks(op, x, out, noise, count, length);
        x += count * length;
        out += count * length;
        if (noise) noise += count * length;
        n -= count * length;
    }
}

}  // namespace
}  // namespace mx::MX_ISA
