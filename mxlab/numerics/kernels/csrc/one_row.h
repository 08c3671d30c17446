// One row of an activation times a panel of outputs: codes are multiplied as they lie in memory, and the sums of eight
// outputs brought beside each other afterwards, which is less work than to bring the codes in order first.
#pragma once

#include "scale_panel.h"

namespace mx::MX_ISA {
namespace {

#if defined(__AVX2__)

// Blocks must be of whole reads, and products of two bytes fit 16 bits in pairs. Weights of eight bits are multiplied
// by magnitude and sign, others with their offset.
DotMethod method_of_one_row(const DotElement& e, int weight, int input, const DotShape& s) {
    constexpr int LARGEST = 32767;
    const int product = (e.bits == 8 ? weight : weight + e.offset) * input;
    const bool serves = s.rows == 1 && s.block % CODES_READ == 0 && input <= 127 && 2 * product <= LARGEST;
    return {e.bits == 8 ? Starts::none : Starts::whole,
            CODES_READ / 4,
            1,
            serves && (e.bits != 8 || e.is_int),
            e.bits == 4,
            (4 * product <= LARGEST) + (8 * product <= LARGEST)};
}

MX_INLINE __m256i bytes_at(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

// The codes of even elements, then those of odd ones.
MX_INLINE Bytes of_four_bits_apart(const uint8_t* packed, __m256i table) {
    const __m256i twice = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed)));
    const __m256i shifted = _mm256_srlv_epi32(twice, _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4));
    return _mm256_shuffle_epi8(table, _mm256_and_si256(shifted, _mm256_set1_epi8(15)));
}

template <bool B>
struct Flag {
    static constexpr bool value = B;
};

// Sums of neighbouring words of both, which fit 16 bits if IS_NARROW.
template <bool IS_NARROW>
MX_INLINE __m256i sums_of(__m256i a, __m256i b) {
    if constexpr (IS_NARROW) return _mm256_madd_epi16(_mm256_packs_epi32(a, b), _mm256_set1_epi16(1));
    return _mm256_hadd_epi32(a, b);
}

// Return the sums of eight vectors of words, which `vector` gives; FIRST and SECOND: sums of two, and of four of the
// words fit 16 bits.
template <bool FIRST, bool SECOND, class Vector>
MX_INLINE __m256i sums_of_eight(Vector vector) {
    const auto two = [&](int i) { return settled(sums_of<FIRST>(vector(i), vector(i + 1))); };
    const __m256i left = settled(sums_of<SECOND>(two(0), two(2))), right = sums_of<SECOND>(two(4), two(6));
    return _mm256_add_epi32(_mm256_permute2x128_si256(left, right, 0x20), _mm256_permute2x128_si256(left, right, 0x31));
}

// Codes of the row, what the sums of each read start with (or null), and the scales of its blocks.
struct Row {
    const int8_t* codes;
    const int32_t* starts;
    const float* scales;
};

// The codes of eight outputs, `stride` bytes apart; a copy where they would be read beyond the end of the tensor.
class EightOutputs {
   public:
    EightOutputs(const DotWeight& w, int64_t output, int64_t offset, int64_t bytes)
        : first(w.elements + output * w.row_bytes + offset), stride(w.row_bytes) {
        const int64_t end = w.outputs * w.row_bytes - offset;
        if ((output + 7) * w.row_bytes + bytes + CODES_READ <= end) return;
        std::memset(copies_, 0, sizeof copies_);
        for (int64_t c = 0; c < 8 && output + c < w.outputs; ++c) {
            const int64_t left = end - (output + c) * w.row_bytes;
            std::memcpy(copies_[c], first + c * stride, static_cast<std::size_t>(left < bytes ? left : bytes));
        }
        first = copies_[0];
        stride = sizeof copies_[0];
    }
    const uint8_t* first;
    int64_t stride;

   private:
    uint8_t copies_[8][MOST_CODES + CODES_READ];
};

// Add the products of eight outputs to their sums; multiply(codes, row) gives products that are added up in fours.
template <bool FIRST, bool SECOND, class Multiply>
MX_INLINE void add_eight(const EightOutputs& w, int64_t read_bytes, int64_t count, int64_t reads, const Row& row,
                         const float* scales, float* sums, Multiply multiply) {
    __m256 sum = _mm256_loadu_ps(sums);
    const int64_t stride = w.stride, thrice = 3 * stride;
    const uint8_t *near = w.first, *far = w.first + 4 * stride;
    const uint8_t* ahead = w.first + PANEL * stride;  // of the next panel: memory is read row by row, too slowly
    for (int64_t b = 0, read = 0; read < count / CODES_READ; ++b) {
        __m256i whole = _mm256_setzero_si256();
        for (int64_t r = 0; r < reads; ++r, ++read, near += read_bytes, far += read_bytes) {
            for (int64_t line = 0; line < read_bytes / 8; ++line) __builtin_prefetch(ahead + 64 * line);
            ahead += 8 * read_bytes;
            const __m256i codes = bytes_at(row.codes + read * CODES_READ);
            const auto vector = [&](int i) {
                const uint8_t* const four = i < 4 ? near : far;
                return multiply(four + (i % 4 == 3 ? thrice : i % 4 * stride), codes);
            };
            if (row.starts) whole = _mm256_add_epi32(whole, _mm256_set1_epi32(row.starts[read]));
            whole = _mm256_add_epi32(whole, sums_of_eight<FIRST, SECOND>(vector));
        }
        const __m256 both = _mm256_mul_ps(_mm256_set1_ps(row.scales[b]), _mm256_load_ps(scales + b * PANEL));
        sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(whole), both, sum);
    }
    _mm256_storeu_ps(sums, sum);
}

template <class Multiply>
MX_NOINLINE void add_outputs(const DotWeight& w, const DotMethod& m, const DotShape& s, int64_t output, int64_t offset,
                             int64_t read_bytes, int64_t count, const Row& row, const float* scales, float* sums,
                             Multiply multiply) {
    for (int64_t half = 0; half < PANEL; half += 8) {
        const EightOutputs eight(w, output + half, offset, count / CODES_READ * read_bytes);
        const int64_t reads = s.block / CODES_READ;
        const auto add = [&](auto first, auto second) {
            add_eight<decltype(first)::value, decltype(second)::value>(eight, read_bytes, count, reads, row,
                                                                       scales + half, sums + half, multiply);
        };
        if (m.levels == 2)
            add(Flag<true>{}, Flag<true>{});
        else if (m.levels == 1)
            add(Flag<true>{}, Flag<false>{});
        else
            add(Flag<false>{}, Flag<false>{});
    }
}

// Add the products with codes [first, first + count) of a panel to its sums.
void add_one_row(const DotWeight& w, const DotElement& e, const DotMethod& m, const DotShape& s, const DotInput& in,
                 int64_t output, int64_t first, int64_t count, const float* scales, float* sums) {
    const Row row{static_cast<const int8_t*>(in.codes) + first, in.starts ? in.starts + first / CODES_READ : nullptr,
                  in.scales + first / s.block};
    const __m256i ones = _mm256_set1_epi16(1);
    const auto add = [&](auto multiply) {
        add_outputs(w, m, s, output, first * e.bits / 8, CODES_READ * e.bits / 8, count, row, scales, sums,
                    [&](const uint8_t* p, __m256i codes) { return _mm256_madd_epi16(multiply(p, codes), ones); });
    };
    if (e.bits == 4) {
        const __m256i table = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(e.bytes)));
        return add(
            [&](const uint8_t* p, __m256i codes) { return _mm256_maddubs_epi16(of_four_bits_apart(p, table), codes); });
    }
    if (e.bits == 8)
        return add([&](const uint8_t* p, __m256i codes) {
            const __m256i weight = bytes_at(p);
            return _mm256_maddubs_epi16(_mm256_abs_epi8(weight), _mm256_sign_epi8(codes, weight));
        });
    with_reader(e, [&](auto read) {
        add([&](const uint8_t* p, __m256i codes) { return _mm256_maddubs_epi16(read(p), codes); });
    });
}

#else

DotMethod method_of_one_row(const DotElement&, int, int, const DotShape&) {
    return {Starts::none, 1, 1, false, false, 0};
}

void add_one_row(const DotWeight&, const DotElement&, const DotMethod&, const DotShape&, const DotInput&, int64_t,
                 int64_t, int64_t, const float*, float*) {}

#endif

}  // namespace
}  // namespace mx::MX_ISA
