// Packed codes of a panel of outputs, brought into the order in which dot.cpp multiplies them.
#pragma once

#include <cstring>

#include "dot.h"
#include "loops.h"

namespace mx::MX_ISA {
namespace {

// Codes [first, first + CODES_READ) of a row, with the bytes that hold them copied where they end the tensor, as more
// than these may be read. What follows the codes of the row, is of any value.
class CodesAt {
   public:
    CodesAt(const DotWeight& w, const DotElement& e, int64_t output, int64_t first) {
        const int64_t offset = output * w.row_bytes + first * e.bits / 8, left = w.outputs * w.row_bytes - offset;
        at_ = w.elements + offset;
        if (left >= CODES_READ) return;
        std::memset(copy_, 0, sizeof copy_);
        if (left > 0) std::memcpy(copy_, at_, left);
        at_ = copy_;
    }
    operator const uint8_t*() const { return at_; }

   private:
    const uint8_t* at_;
    uint8_t copy_[CODES_READ];
};

// Look up CODES_READ codes in a table.
template <class Entry>
MX_INLINE void look_up(const uint8_t* packed, int bits, const Entry* table, Entry* out) {
    const u32 mask = (1u << bits) - 1;
    for (int64_t i = 0; i < CODES_READ; ++i) {
        const int64_t bit = i * bits;
        const u32 two = packed[bit / 8] | (bit % 8 + bits > 8 ? packed[bit / 8 + 1] << 8 : 0);
        out[i] = table[two >> (bit % 8) & mask];
    }
}

#if defined(__AVX2__)

using Bytes = __m256i;

// Return a sum that stands here in the code: GCC would compute many products first, and run out of registers.
MX_INLINE __m256i settled(__m256i sum) {
    asm("" : "+x"(sum));
    return sum;
}

// Reads CODES_READ codes as bytes, in their order.
MX_INLINE Bytes of_four_bits(const uint8_t* packed, const DotElement& e) {
    const __m128i table = _mm_loadu_si128(reinterpret_cast<const __m128i*>(e.bytes)), mask = _mm_set1_epi8(15);
    const __m128i two = _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed));
    const __m128i even = _mm_shuffle_epi8(table, _mm_and_si128(two, mask));
    const __m128i odd = _mm_shuffle_epi8(table, _mm_and_si128(_mm_srli_epi16(two, 4), mask));
    return _mm256_set_m128i(_mm_unpackhi_epi8(even, odd), _mm_unpacklo_epi8(even, odd));
}

MX_INLINE Bytes of_six_bits(const uint8_t* packed, const DotElement& e) {
    const auto at = [](const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); };
    const auto table = [&](int i) { return _mm256_broadcastsi128_si256(at(e.bytes + 16 * i)); };
    // Three bytes hold four codes: first they get a word of their own, then every code a byte.
    const __m256i spread =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1));
    const __m256i word = _mm256_shuffle_epi8(_mm256_set_m128i(at(packed + 12), at(packed)), spread);
    const auto moved = [&](int by, int mask) {
        return _mm256_and_si256(_mm256_slli_epi32(word, by), _mm256_set1_epi32(mask));
    };
    const __m256i code = _mm256_or_si256(_mm256_or_si256(moved(0, 0x3F), moved(2, 0x3F00)),
                                         _mm256_or_si256(moved(4, 0x3F0000), moved(6, 0x3F000000)));
    const __m256i by_four = _mm256_slli_epi32(code, 3), by_five = _mm256_slli_epi32(code, 2);  // into the top bit
    const __m256i low =
        _mm256_blendv_epi8(_mm256_shuffle_epi8(table(0), code), _mm256_shuffle_epi8(table(1), code), by_four);
    const __m256i high =
        _mm256_blendv_epi8(_mm256_shuffle_epi8(table(2), code), _mm256_shuffle_epi8(table(3), code), by_four);
    return _mm256_blendv_epi8(low, high, by_five);
}

MX_INLINE Bytes of_eight_bits(const uint8_t* packed) {
    const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed));
    return _mm256_xor_si256(codes, _mm256_set1_epi8(-128));  // + 128
}

MX_INLINE Bytes of_any_bits(const uint8_t* packed, const DotElement& e) {
    alignas(32) uint8_t found[CODES_READ];
    look_up(packed, e.bits, e.bytes, found);
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(found));
}

// Eight rows of eight words become eight columns.
MX_INLINE void transpose(const __m256i (&r)[8], __m256i (&out)[8]) {
    __m256i t[8];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        t[2 * i] = _mm256_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm256_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    const __m256i u[8] = {_mm256_unpacklo_epi64(t[0], t[2]), _mm256_unpackhi_epi64(t[0], t[2]),
                          _mm256_unpacklo_epi64(t[1], t[3]), _mm256_unpackhi_epi64(t[1], t[3]),
                          _mm256_unpacklo_epi64(t[4], t[6]), _mm256_unpackhi_epi64(t[4], t[6]),
                          _mm256_unpacklo_epi64(t[5], t[7]), _mm256_unpackhi_epi64(t[5], t[7])};
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        out[i] = _mm256_permute2x128_si256(u[i], u[i + 4], 0x20);
        out[i + 4] = _mm256_permute2x128_si256(u[i], u[i + 4], 0x31);
    }
}

MX_INLINE void store_columns(const __m256i (&rows)[8], uint8_t* panel) {
    __m256i columns[8];
    transpose(rows, columns);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) _mm256_store_si256(reinterpret_cast<__m256i*>(panel + i * PANEL * 4), columns[i]);
}

// Unpack codes [first, first + count) of a panel into bytes [count / 4][PANEL][4].
template <class Read>
MX_INLINE void unpack_bytes(const DotWeight& w, const DotElement& e, int64_t output, int64_t first, int64_t count,
                            uint8_t* panel, Read read) {
    for (int64_t half = 0; half < 2; ++half)
        for (int64_t k = 0; k < count; k += CODES_READ) {
            __m256i rows[8];
#pragma GCC unroll 8
            for (int c = 0; c < 8; ++c) rows[c] = read(CodesAt(w, e, output + half * 8 + c, first + k));
            store_columns(rows, panel + k * PANEL + half * 32);
        }
}

// Unpack them into int16 [count / 2][PANEL][2], without the offset.
template <class Read>
MX_INLINE void unpack_words(const DotWeight& w, const DotElement& e, int64_t output, int64_t first, int64_t count,
                            uint8_t* panel, Read read) {
    const __m256i offset = _mm256_set1_epi16(static_cast<int16_t>(e.offset));
    for (int64_t half = 0; half < 2; ++half)
        for (int64_t k = 0; k < count; k += CODES_READ) {
            __m256i low[8], high[8];
#pragma GCC unroll 8
            for (int c = 0; c < 8; ++c) {
                const __m256i bytes = read(CodesAt(w, e, output + half * 8 + c, first + k));
                low[c] = _mm256_sub_epi16(_mm256_cvtepu8_epi16(_mm256_castsi256_si128(bytes)), offset);
                high[c] = _mm256_sub_epi16(_mm256_cvtepu8_epi16(_mm256_extracti128_si256(bytes, 1)), offset);
            }
            store_columns(low, panel + 2 * k * PANEL + half * 32);
            store_columns(high, panel + 2 * (k + 16) * PANEL + half * 32);
        }
}

// Call f with what reads CODES_READ codes.
template <class F>
MX_INLINE void with_reader(const DotElement& e, F f) {
    if (e.bits == 4) return f([&](const uint8_t* p) { return of_four_bits(p, e); });
    if (e.bits == 6) return f([&](const uint8_t* p) { return of_six_bits(p, e); });
    if (e.bits == 8 && e.is_int) return f([&](const uint8_t* p) { return of_eight_bits(p); });
    f([&](const uint8_t* p) { return of_any_bits(p, e); });
}

MX_NOINLINE void unpack(const DotWeight& w, const DotElement& e, int code_bytes, int64_t output, int64_t first,
                        int64_t count, uint8_t* panel) {
    with_reader(e, [&](auto read) {
        if (code_bytes == 1)
            unpack_bytes(w, e, output, first, count, panel, read);
        else
            unpack_words(w, e, output, first, count, panel, read);
    });
}

#else

MX_NOINLINE void unpack(const DotWeight& w, const DotElement& e, int, int64_t output, int64_t first, int64_t count,
                        uint8_t* panel) {
    for (int64_t c = 0; c < PANEL; ++c)
        for (int64_t k = 0; k < count; k += CODES_READ) {
            uint8_t found[CODES_READ];
            look_up<uint8_t>(CodesAt(w, e, output + c, first + k), e.bits, e.bytes, found);
            for (int64_t i = 0; i < CODES_READ; i += 4)
                std::memcpy(panel + ((k + i) / 4 * PANEL + c) * 4, found + i, 4);
        }
}

#endif

}  // namespace
}  // namespace mx::MX_ISA
