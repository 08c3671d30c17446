// Products of activations with packed weights: both are integers times a scale for each block, so that the sum over a
// block is exact in integers, and costs one multiply-add by the two scales.
//
// dot.cpp is compiled once for each instruction set that has instructions for it. The sum over blocks is one chain of
// fused multiply-adds in their order: the bits are those of any instruction set, thread count and number of rows.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace mx {

constexpr int64_t PANEL = 16;         // outputs that are computed together
constexpr int64_t CODES_READ = 32;    // codes of a row that are unpacked together
constexpr int64_t MOST_CODES = 1536;  // of a row, that are unpacked before they are multiplied: 16 rows fit the cache

constexpr int64_t MOST_ROWS = 192;  // of an activation, whose sums are kept at once

// The weight [outputs, inputs], rows of codes packed bit by bit: the layout of mxlab/packed/bits.py.
struct DotWeight {
    const uint8_t* elements;  // [outputs, row_bytes]
    const uint8_t* scales;    // [outputs, blocks], codes
    const float* scale_of;    // [256]: what each stands for, times the unit of the integers
    float unit;               // those are 2^(code - 127) times this, but for blocks of zeros; or 0
    int64_t outputs, row_bytes;
};

// What the codes of a weight are as integers.
struct DotElement {
    int bits;
    bool is_int;         // codes are two's complement
    int offset;          // added to make them bytes without a sign: minus the smallest
    uint8_t bytes[256];  // the integer of each code, plus the offset
};

// What the sums of a block start with, to undo the offset.
enum class Starts {
    none,
    whole,   // an int32
    halves,  // two int16: for the products of elements 0 and 1 of every four, and of 2 and 3
};

// How an instruction set multiplies a pair of formats.
struct DotMethod {
    Starts starts;
    int steps;        // fours of elements that are summed between two starts
    int code_bytes;   // of an activation: 1 or 2
    bool is_one_row;  // by one_row.h
    bool is_apart;    // of 32 codes of an activation, those of even elements come first
    int levels;       // of one_row.h: how often sums may be added up in 16 bits
};

// Rows of an activation, cut into blocks of `block` elements; `padded` codes a row, 0 from the last input on.
struct DotShape {
    int64_t rows, inputs, block, padded;
    int64_t blocks() const { return (inputs + block - 1) / block; }
};

// An activation as integers times scales.
struct DotInput {
    void* codes;      // int8 or int16 [rows, padded]
    float* scales;    // [rows, padded / block], each times the unit of the integers; 0 for a block of zeros
    int32_t* starts;  // [rows, padded / (4 steps)], or null
};

struct DotOutput {
    void* target;      // [rows, outputs]
    const void* bias;  // [outputs], or null; both of one type
    Dtype dtype;
};

// Where the values of a packed tensor go: rows of `length`, in blocks of `block`.
struct Unpacking {
    void* target;
    Dtype dtype;
    const float* value_of;  // [256]: the element of each code, or null where DotElement has the integers
    int64_t length, block;
};

constexpr int64_t MOST_LENGTH = 1024;  // of a packed row that an attention multiplies

// A few rows of numbers that are multiplied by packed rows, or by which these are: see attend.h.
struct Attending {
    const float* source;
    float* target;
    int64_t rows, source_stride, target_stride;
    const float* value_of;  // as in Unpacking
    int64_t length, block;  // of a packed row; the length is a multiple of eight
};

struct DotKernels {
    // `weight` and `input` are the largest magnitudes of the integers.
    DotMethod (*method)(const DotElement&, int weight, int input, const DotShape&);
    // Outputs [panel * PANEL, (panel + 1) * PANEL) of rows [first, last), at most MOST_ROWS.
    void (*multiply)(const DotWeight&, const DotElement&, const DotMethod&, const DotShape&, const DotInput&,
                     const DotOutput&, int64_t panel, int64_t first, int64_t last);
    // The values of rows [first, last).
    void (*values)(const DotWeight&, const DotElement&, const Unpacking&, int64_t first, int64_t last);
    // Every row [length] times every packed row: [rows, packed rows].
    void (*score)(const DotWeight&, const DotElement&, const Attending&);
    // The sums of the packed rows, each times its number in a row [packed rows]: [rows, length].
    void (*mix)(const DotWeight&, const DotElement&, const Attending&);
};

extern const DotKernels portable_dot, avx2_dot, avx512vnni_dot;  // the latter two on x86-64 only

}  // namespace mx
