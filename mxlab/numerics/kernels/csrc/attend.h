// Products of a few rows of numbers with packed rows, as an attention has them: queries with keys, and probabilities
// with values. Packed rows are unpacked a few at a time, into the cache of the processor.
//
// Sums are fused multiply-adds in an order that depends on shapes alone: the bits are those of any instruction set and
// number of threads.
#pragma once

#include <algorithm>
#include <cmath>

#include "values.h"

namespace mx::MX_ISA {
namespace {

constexpr int64_t LANES = 8;            // sums of a product that are added up side by side
constexpr int64_t TOGETHER = 8;         // packed rows that are multiplied at once
constexpr int64_t UNPACKED = 4096;      // numbers that are unpacked at once; more where eight rows are longer
constexpr int64_t COLUMNS = 8 * LANES;  // of a sum of packed rows that are kept in registers

// Packed rows, unpacked piece by piece: f(numbers, first, count) for rows [first, first + count).
template <class F>
MX_INLINE void for_unpacked(const DotWeight& w, const DotElement& e, const Attending& a, F f) {
    alignas(64) float numbers[TOGETHER * MOST_LENGTH];
    const int64_t most = std::max(TOGETHER, UNPACKED / a.length / TOGETHER * TOGETHER);
    const int64_t blocks = (a.length + a.block - 1) / a.block;
    for (int64_t first = 0; first < w.outputs; first += most) {
        const int64_t count = std::min(most, w.outputs - first);
        DotWeight piece = w;
        piece.elements += first * w.row_bytes;
        piece.scales += first * blocks;
        piece.outputs = w.outputs - first;
        values(piece, e, {numbers, Dtype::float32, a.value_of, a.length, a.block}, 0, count);
        f(numbers, first, count);
    }
}

#if defined(__AVX2__)

using Lanes = __m256;

MX_INLINE Lanes lanes_at(const float* x) { return _mm256_loadu_ps(x); }
MX_INLINE void put_lanes(float* x, Lanes v) { _mm256_storeu_ps(x, v); }
MX_INLINE Lanes no_lanes() { return _mm256_setzero_ps(); }
MX_INLINE Lanes all_lanes(float x) { return _mm256_set1_ps(x); }
MX_INLINE Lanes added_product(Lanes a, Lanes b, Lanes sum) { return _mm256_fmadd_ps(a, b, sum); }

// The sums of eight vectors.
MX_INLINE void put_sums(const Lanes (&v)[TOGETHER], float* out) {
    const auto four = [&](int i) {
        return _mm256_hadd_ps(_mm256_hadd_ps(v[i], v[i + 1]), _mm256_hadd_ps(v[i + 2], v[i + 3]));
    };
    const Lanes low = four(0), high = four(4);
    put_lanes(out, _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31)));
}

#else

struct Lanes {
    float of[LANES];
};

MX_INLINE Lanes lanes_at(const float* x) {
    Lanes v;
    std::memcpy(v.of, x, sizeof v.of);
    return v;
}
MX_INLINE void put_lanes(float* x, const Lanes& v) { std::memcpy(x, v.of, sizeof v.of); }
MX_INLINE Lanes no_lanes() { return {}; }
MX_INLINE Lanes all_lanes(float x) { return {{x, x, x, x, x, x, x, x}}; }
MX_INLINE Lanes added_product(const Lanes& a, const Lanes& b, Lanes sum) {
    for (int64_t i = 0; i < LANES; ++i) sum.of[i] = std::fma(a.of[i], b.of[i], sum.of[i]);
    return sum;
}
MX_INLINE void put_sums(const Lanes (&v)[TOGETHER], float* out) {
    for (int64_t i = 0; i < TOGETHER; ++i) {
        const float* const s = v[i].of;
        out[i] = ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]));
    }
}

#endif

// Multiply a row by packed rows, one number each.
MX_INLINE void score_row(const float* row, const float* numbers, int64_t count, int64_t length, float* out) {
    for (int64_t t = 0; t < count; t += TOGETHER) {
        Lanes sums[TOGETHER];
        for (auto& sum : sums) sum = no_lanes();
        const float* const at = numbers + t * length;  // what lies behind the last row is multiplied, and dropped
        for (int64_t k = 0; k < length; k += LANES) {
            const Lanes own = lanes_at(row + k);
#pragma GCC unroll 8
            for (int64_t i = 0; i < TOGETHER; ++i) sums[i] = added_product(own, lanes_at(at + i * length + k), sums[i]);
        }
        float found[TOGETHER];
        put_sums(sums, found);
        std::memcpy(out + t, found, std::min(TOGETHER, count - t) * sizeof(float));
    }
}

void score(const DotWeight& w, const DotElement& e, const Attending& a) {
    for_unpacked(w, e, a, [&](const float* numbers, int64_t first, int64_t count) {
        for (int64_t r = 0; r < a.rows; ++r)
            score_row(a.source + r * a.source_stride, numbers, count, a.length, a.target + r * a.target_stride + first);
    });
}

// Add packed rows, each times its factor, to `N` times LANES sums.
template <int N>
MX_INLINE void add_columns(const float* factors, const float* numbers, int64_t count, int64_t length, float* out) {
    Lanes sums[N];
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) sums[i] = lanes_at(out + i * LANES);
    for (int64_t t = 0; t < count; ++t) {
        const Lanes factor = all_lanes(factors[t]);
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i)
            sums[i] = added_product(factor, lanes_at(numbers + t * length + i * LANES), sums[i]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) put_lanes(out + i * LANES, sums[i]);
}

void mix(const DotWeight& w, const DotElement& e, const Attending& a) {
    for (int64_t r = 0; r < a.rows; ++r) std::fill_n(a.target + r * a.target_stride, a.length, 0.0f);
    for_unpacked(w, e, a, [&](const float* numbers, int64_t first, int64_t count) {
        for (int64_t r = 0; r < a.rows; ++r) {
            const float* const factors = a.source + r * a.source_stride + first;
            float* const out = a.target + r * a.target_stride;
            int64_t k = 0;
            for (; k + COLUMNS <= a.length; k += COLUMNS)
                add_columns<8>(factors, numbers + k, count, a.length, out + k);
            for (; k < a.length; k += LANES) add_columns<1>(factors, numbers + k, count, a.length, out + k);
        }
    });
}

}  // namespace
}  // namespace mx::MX_ISA
