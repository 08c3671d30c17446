// Hints to the compiler for the CPU's loops, and the way from run-time values to template arguments.
//
// This header and those that include it are parts of kernels.cpp. Everything in them has internal linkage, as each
// instruction set has its own.
#pragma once

#include "kernels.h"
#include "ops.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

// Iterations are independent, even where the target is the source.
#if defined(__clang__)
#define MX_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define MX_INDEPENDENT _Pragma("GCC ivdep")
#endif

#define MX_NOINLINE __attribute__((noinline))

// For table look-ups: two scalar loads a cycle are faster than what compilers make of a table and vectors.
#if defined(__clang__)
#define MX_SCALAR MX_NOINLINE
#else
#define MX_SCALAR __attribute__((noinline, optimize("no-tree-vectorize")))
#endif

namespace mx::MX_ISA {
namespace {

// Call f with the storage type of a dtype.
template <class F>
void with_dtype(Dtype dtype, F f) {
    if (dtype == Dtype::float32) return f(F32{});
    if (dtype == Dtype::bfloat16) return f(BF16{});
    f(F16{});
}

template <Rounding R>
struct Constant {
    static constexpr Rounding value = R;
};

// Whether microxcaling, too, has the rounding.
constexpr bool is_microxcalings(Rounding rounding) { return rounding != Rounding::nearest_zero; }

// Call f with the rounding as a constant.
template <class F>
void with_rounding(Rounding rounding, F f) {
    if (rounding == Rounding::nearest) return f(Constant<Rounding::nearest>{});
    if (rounding == Rounding::nearest_zero) return f(Constant<Rounding::nearest_zero>{});
    if (rounding == Rounding::even) return f(Constant<Rounding::even>{});
    if (rounding == Rounding::floor) return f(Constant<Rounding::floor>{});
    f(Constant<Rounding::dither>{});
}

}  // namespace
}  // namespace mx::MX_ISA
