// What the parts of the extension module share.
#pragma once

#include <nanobind/nanobind.h>

#include "dot.h"
#include "kernels.h"

namespace mx {

// Elements of a job that is done before another thread has woken up.
constexpr int64_t WORTH_A_THREAD = 1 << 15;

// The kernels in use: of the best instruction set of this processor, or of another that was asked for.
const Kernels& active_kernels();

// Return the tensors of a job from their addresses, and the number of their dtype.
Buffers buffers(uintptr_t source, uintptr_t target, uintptr_t noise, int dtype);

// Return how many of the threads a job of so many elements is worth.
int useful(int threads, int64_t elements);

// Return the format with the scale of this tensor, if it has one for each tensor.
Format with_tensor_scale(Format format, const Buffers& b, int64_t count, int threads);

// Return the products of the instruction set that the other kernels use, or of the best below it that has its own.
const DotKernels& active_dot();

// Add what products.cpp has, and attend.cpp.
void bind_products(nanobind::module_& m);
void bind_attend(nanobind::module_& m);

}  // namespace mx
