// Rows of an activation times a panel of outputs: the innermost loops of dot.cpp, for each instruction set.
#pragma once

#include "unpack.h"

namespace mx::MX_ISA {
namespace {

// A piece of the rows and of the panel, whole blocks of them.
struct Tile {
    const uint8_t* panel;        // as unpack.h leaves it
    const float* weight_scales;  // [blocks][PANEL]
    const uint8_t* codes;        // the activation's, int8 or int16
    const float* scales;
    const int32_t* starts;
    int64_t code_stride, scale_stride, start_stride;  // from row to row: in bytes; in elements
    int64_t blocks, fours;                            // blocks; fours of elements of a block
};

#if defined(__AVX512VNNI__)

DotMethod method_of_tiles(const DotElement&, int, int, int64_t block) {
    return {Starts::whole, static_cast<int>(block / 4), 1, false, false, 0};
}

template <int R>
MX_NOINLINE void multiply_tile(const Tile& t, const DotMethod&, float* sums) {
    __m512 sum[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) sum[r] = _mm512_loadu_ps(sums + r * PANEL);
    const uint8_t *panel = t.panel, *codes = t.codes;
    for (int64_t b = 0; b < t.blocks; ++b) {
        __m512i whole[R];
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) whole[r] = _mm512_set1_epi32(t.starts[r * t.start_stride + b]);
        for (int64_t k = 0; k < t.fours; ++k, panel += PANEL * 4, codes += 4) {
            const __m512i weight = _mm512_load_si512(panel);
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) {
                int32_t four;
                __builtin_memcpy(&four, codes + r * t.code_stride, sizeof four);
                whole[r] = _mm512_dpbusd_epi32(whole[r], weight, _mm512_set1_epi32(four));
            }
        }
        const __m512 scale = _mm512_loadu_ps(t.weight_scales + b * PANEL);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            const __m512 both = _mm512_mul_ps(_mm512_set1_ps(t.scales[r * t.scale_stride + b]), scale);
            sum[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole[r]), both, sum[r]);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) _mm512_storeu_ps(sums + r * PANEL, sum[r]);
}

// Of so many rows, how many are done together: their sums fit the registers.
constexpr int64_t rows_done(int64_t rows) {
    return rows >= 12 ? 12 : rows >= 8 ? 8 : rows >= 4 ? 4 : rows >= 2 ? 2 : 1;
}

void multiply_rows(const Tile& t, const DotMethod& m, int64_t rows, float* sums) {
    if (rows == 12) return multiply_tile<12>(t, m, sums);
    if (rows == 8) return multiply_tile<8>(t, m, sums);
    if (rows == 4) return multiply_tile<4>(t, m, sums);
    if (rows == 2) return multiply_tile<2>(t, m, sums);
    multiply_tile<1>(t, m, sums);
}

#elif defined(__AVX2__)

// Sums of products are kept in 16 bits as far as they fit; bytes without a sign times bytes with one must fit in pairs.
DotMethod method_of_tiles(const DotElement& e, int weight, int input, int64_t block) {
    constexpr int LARGEST = 32767;
    int steps = 8;
    while (steps > 1 && (block / 4 % steps != 0 || 2 * steps * weight * input > LARGEST)) steps /= 2;
    if (2 * (weight + e.offset) * input > LARGEST) return {Starts::none, 1, 2, false, false, 0};
    return {Starts::halves, steps, 1, false, false, 0};
}

MX_INLINE __m256i words_at(const uint8_t* p) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(p)); }

MX_INLINE __m256i four_bytes_everywhere(const uint8_t* p) {
    int32_t four;
    __builtin_memcpy(&four, p, sizeof four);
    return _mm256_set1_epi32(four);
}

// The sums of R rows and PANEL outputs, in registers.
template <int R>
struct Sums {
    __m256 value[R][2];

    MX_MEMBER void load(const float* from) {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
            for (int h = 0; h < 2; ++h) value[r][h] = _mm256_loadu_ps(from + r * PANEL + h * 8);
    }
    MX_MEMBER void store(float* to) const {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
            for (int h = 0; h < 2; ++h) _mm256_storeu_ps(to + r * PANEL + h * 8, value[r][h]);
    }
    MX_MEMBER void add(const Tile& t, int64_t block, const __m256i (&whole)[R][2]) {
        const float* const scales = t.weight_scales + block * PANEL;
        const __m256 scale[2] = {_mm256_loadu_ps(scales), _mm256_loadu_ps(scales + 8)};
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const __m256 own = _mm256_set1_ps(t.scales[r * t.scale_stride + block]);
#pragma GCC unroll 2
            for (int h = 0; h < 2; ++h)
                value[r][h] =
                    _mm256_fmadd_ps(_mm256_cvtepi32_ps(whole[r][h]), _mm256_mul_ps(own, scale[h]), value[r][h]);
        }
    }
};

// Bytes: a block's products are summed in 16 bits, STEPS fours at a time, and widened then. IS_ONE: a block is that.
template <int R, int STEPS, bool IS_ONE>
MX_NOINLINE void multiply_bytes(const Tile& t, float* sums) {
    Sums<R> sum;
    sum.load(sums);
    const __m256i ones = _mm256_set1_epi16(1);
    const uint8_t *panel = t.panel, *codes = t.codes;
    const int32_t* starts = t.starts;
    for (int64_t b = 0; b < t.blocks; ++b) {
        __m256i whole[R][2] = {};
        for (int64_t k = 0; k < (IS_ONE ? 1 : t.fours / STEPS); ++k, ++starts) {
            __m256i half[R][2];
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) half[r][0] = half[r][1] = _mm256_set1_epi32(starts[r * t.start_stride]);
#pragma GCC unroll 8
            for (int s = 0; s < STEPS; ++s, panel += PANEL * 4, codes += 4) {
                const __m256i weight[2] = {words_at(panel), words_at(panel + 32)};
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r) {
                    const __m256i four = four_bytes_everywhere(codes + r * t.code_stride);
#pragma GCC unroll 2
                    for (int h = 0; h < 2; ++h)
                        half[r][h] = settled(_mm256_add_epi16(half[r][h], _mm256_maddubs_epi16(weight[h], four)));
                }
            }
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
                for (int h = 0; h < 2; ++h) {
                    const __m256i wide = _mm256_madd_epi16(half[r][h], ones);
                    whole[r][h] = IS_ONE ? wide : _mm256_add_epi32(whole[r][h], wide);
                }
        }
        sum.add(t, b, whole);
    }
    sum.store(sums);
}

// Words of 16 bits, whose products are summed in 32.
template <int R>
MX_NOINLINE void multiply_words(const Tile& t, float* sums) {
    Sums<R> sum;
    sum.load(sums);
    const uint8_t *panel = t.panel, *codes = t.codes;
    for (int64_t b = 0; b < t.blocks; ++b) {
        __m256i whole[R][2] = {};
#pragma GCC unroll 4
        for (int64_t k = 0; k < 2 * t.fours; ++k, panel += PANEL * 4, codes += 4) {
            const __m256i weight[2] = {words_at(panel), words_at(panel + 32)};
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                const __m256i two = four_bytes_everywhere(codes + r * t.code_stride);
#pragma GCC unroll 2
                for (int h = 0; h < 2; ++h)
                    whole[r][h] = settled(_mm256_add_epi32(whole[r][h], _mm256_madd_epi16(weight[h], two)));
            }
        }
        sum.add(t, b, whole);
    }
    sum.store(sums);
}

template <int R>
void multiply_tile(const Tile& t, const DotMethod& m, float* sums) {
    if (m.code_bytes == 2) return multiply_words<R>(t, sums);
    const bool is_one = t.fours == m.steps;
    if (m.steps == 8) return is_one ? multiply_bytes<R, 8, true>(t, sums) : multiply_bytes<R, 8, false>(t, sums);
    if (m.steps == 4) return is_one ? multiply_bytes<R, 4, true>(t, sums) : multiply_bytes<R, 4, false>(t, sums);
    if (m.steps == 2) return is_one ? multiply_bytes<R, 2, true>(t, sums) : multiply_bytes<R, 2, false>(t, sums);
    multiply_bytes<R, 1, false>(t, sums);
}

// Of so many rows, how many are done together: their sums fit the registers.
constexpr int64_t rows_done(int64_t rows) { return rows < 3 ? rows : 3; }

void multiply_rows(const Tile& t, const DotMethod& m, int64_t rows, float* sums) {
    if (rows == 3) return multiply_tile<3>(t, m, sums);
    if (rows == 2) return multiply_tile<2>(t, m, sums);
    multiply_tile<1>(t, m, sums);
}

#else

DotMethod method_of_tiles(const DotElement&, int, int, int64_t block) {
    return {Starts::whole, static_cast<int>(block / 4), 1, false, false, 0};
}

constexpr int64_t rows_done(int64_t) { return 1; }

void multiply_rows(const Tile& t, const DotMethod&, int64_t, float* sums) {
    const uint8_t* panel = t.panel;
    const int8_t* codes = reinterpret_cast<const int8_t*>(t.codes);
    for (int64_t b = 0; b < t.blocks; ++b) {
        int32_t whole[PANEL];
        for (int64_t c = 0; c < PANEL; ++c) whole[c] = t.starts[b];
        for (int64_t k = 0; k < t.fours; ++k, panel += PANEL * 4, codes += 4)
            for (int64_t c = 0; c < PANEL; ++c)
                for (int64_t i = 0; i < 4; ++i) whole[c] += panel[c * 4 + i] * codes[i];
        for (int64_t c = 0; c < PANEL; ++c)
            sums[c] =
                __builtin_fmaf(static_cast<float>(whole[c]), t.scales[b] * t.weight_scales[b * PANEL + c], sums[c]);
    }
}

#endif

}  // namespace
}  // namespace mx::MX_ISA
