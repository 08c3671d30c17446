// The interface between module.cpp and the CPU kernels, which are compiled once per instruction set.
#pragma once

#include <cstdint>

#include "mx.h"

namespace mx {

enum class Dtype { float32, bfloat16, float16 };
enum class Numerics { exact, microxcaling };
// Ways of the exact numerics to choose and apply the scale of a block: a power of two; a power of two for elements in
// [-1, 1); the better of two powers; a floating-point number.
enum class Scaling { power, asymmetric, searched, floating };

// A contiguous tensor seen as (outer, axis, inner). Blocks of `block` elements lie along the axis; a trailing partial
// block is a block of its own.
struct Layout {
    int64_t outer, axis, inner, block;
};

// The number of values of a 16-bit type.
constexpr int TABLE_SIZE = 1 << 16;

// The tensors of one job. `noise` holds one uniform number per element if the rounding is dither, and is null
// otherwise.
struct Buffers {
    const void* source;
    void* target;  // may be the source
    const float* noise;
    Dtype dtype;
};

// Inputs of a weight that GPTQ quantizes one after the other; rows are inputs, columns are outputs.
constexpr int64_t MOST_INPUTS = 128;

struct Settling {
    float* weight;         // [inputs, outputs]; becomes what is on the grid
    const float* scales;   // [inputs, outputs], of each element
    const float* factors;  // [inputs, inputs], lower triangular: what an input loses by the errors of those before it
    float* errors;         // [inputs, outputs], a result: the error of each element over the diagonal of `factors`
    int64_t inputs, outputs;
    float lowest;  // elements lie above its negative, in multiples of the scale
};

// Matrices [size, size] that the blocks of a row of `axis` elements are multiplied by: each block by its own, or all by
// one.
constexpr int64_t MOST_TRANSFORMED = 128;

struct Transform {
    const float* matrices;
    int64_t axis, size;
    bool is_shared;
};

// Rows of `length` elements as packed codes, the layout of mxlab/packed/bits.py, and a byte for the scale of each
// block.
struct Packing {
    uint8_t *elements, *scales;
    int64_t length, block, row_bytes;
    int bits, nan_scale;
};

// Of dot.h.
struct DotShape;
struct DotMethod;
struct DotInput;

// The kernels of one instruction set.
struct Kernels {
    const char* name;
    // Work comes in units, done in any order and by any thread: here [first, last) of quantize_units(layout).
    int64_t (*quantize_units)(const Layout&);
    void (*quantize_exact)(const Buffers&, const Layout&, const Format&, Scaling, Rounding, int64_t first,
                           int64_t last);
    // `table` is that of microxcaling_table for a 16-bit type and a rounding other than dither, or null.
    void (*quantize_microxcaling)(const Buffers&, const Layout&, const Format&, Rounding, const u32* table,
                                  int64_t first, int64_t last);
    // Element-wise: units are elements.
    u32 (*largest_finite)(const Buffers&, int64_t first, int64_t last);  // magnitude, as the bits of a float32
    void (*round_alone)(const Buffers&, const Element&, Numerics, Rounding, bool subnormals, int64_t first,
                        int64_t last);
    // Fill in what each value of a 16-bit type, an element already scaled, is rounded to, as the bits of a float32.
    void (*microxcaling_table)(u32* table, Dtype, const Element&, Rounding);
    void (*look_up)(const Buffers&, const uint16_t* table, int64_t first, int64_t last);
    void (*uniform)(float* target, uint64_t seed, int64_t first, int64_t last);
    void (*transform)(const Buffers&, const Transform&, int64_t first, int64_t last);  // units are rows
    int64_t (*settle_units)(const Settling&);
    void (*settle)(const Settling&, const Element&, Rounding, int64_t first, int64_t last);
    // Rows of an activation as integers; `offset` is that of the weights that they are multiplied by. Not for dither.
    void (*encode)(const Buffers&, const Format&, Scaling, Rounding, const DotShape&, const DotMethod&, int offset,
                   const DotInput& out, int64_t first, int64_t last);
    // Rows as packed codes. Not for dither.
    void (*pack)(const Buffers&, const Format&, Scaling, Rounding, const Packing&, int64_t first, int64_t last);
};

extern const Kernels portable_kernels, avx2_kernels, avx512_kernels;  // the latter two on x86-64 only

}  // namespace mx
