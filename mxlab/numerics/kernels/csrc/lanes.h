// Vectors as wide as a register, for sums of products: compilers keep sums in registers where each is a variable.
#pragma once

#include "loops.h"

namespace mx::MX_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int WIDTH = 16;
#elif defined(__AVX__)
constexpr int WIDTH = 8;
#else
constexpr int WIDTH = 4;
#endif

using Vector = float __attribute__((vector_size(WIDTH * sizeof(float))));

MX_INLINE Vector vector_at(const float* x) {
    Vector v;
    __builtin_memcpy(&v, x, sizeof v);
    return v;
}

MX_INLINE void put(float* out, const Vector& v) { __builtin_memcpy(out, &v, sizeof v); }

}  // namespace
}  // namespace mx::MX_ISA
