// Products of activations with packed weights, for Python: see dot.h.
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <numeric>
#include <tuple>
#include <vector>

#include "dot.h"
#include "module.h"
#include "round_plan.h"
#include "threads.h"

namespace nb = nanobind;

namespace mx {

const DotKernels& active_dot() {
#if defined(MX_X86)
    const bool has_vnni = __builtin_cpu_supports("avx512vnni");
    if (&active_kernels() == &avx512_kernels && has_vnni) return avx512vnni_dot;
    if (&active_kernels() != &portable_kernels) return avx2_dot;
#endif
    return portable_dot;
}

namespace {

// What precedes an activation's integers in its memory.
struct alignas(64) Header {
    const DotKernels* kernels;
    DotMethod method;
    float smallest, largest;  // of the scales that are not 0
};

int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// Where in its memory the parts of an activation are.
struct Parts {
    int64_t scales, starts, end;

    Parts(const DotShape& s, const DotMethod& m) {
        scales = aligned(sizeof(Header)) + aligned(s.rows * s.padded * m.code_bytes);
        starts = scales + aligned(s.rows * (s.padded / s.block) * 4);
        end = starts + (m.starts == Starts::none ? 0 : s.rows * (s.padded / (4 * m.steps)) * 4);
    }
    DotInput at(char* memory, const DotMethod& m) const {
        return {memory + aligned(sizeof(Header)), reinterpret_cast<float*>(memory + scales),
                m.starts == Starts::none ? nullptr : reinterpret_cast<int32_t*>(memory + starts)};
    }
};

// Multiplies activations of one format by weights of another.
class ProductPlan {
   public:
    ProductPlan(const Format& activation, Scaling scaling, Rounding rounding, int largest_input,
                const DotElement& weight, int largest_weight, int64_t block)
        : format_(activation),
          scaling_(scaling),
          rounding_(rounding),
          largest_input_(largest_input),
          largest_weight_(largest_weight),
          block_(block),
          element_(weight) {}

    // Return how many bytes an activation takes.
    int64_t bytes(int64_t rows, int64_t inputs) const {
        const DotShape s = shape(rows, inputs);
        return Parts(s, method(active_dot(), s)).end;
    }

    // Turn an activation into integers, each value rounded first, if that is asked for.
    void encode(uintptr_t source, int dtype, int64_t rows, int64_t inputs, RoundPlan* rounder, uintptr_t memory,
                int threads) const {
        const nb::gil_scoped_release release;
        const Kernels& kernels = active_kernels();
        const DotKernels& dot = active_dot();
        const DotShape s = shape(rows, inputs);
        const DotMethod m = method(dot, s);
        const Buffers b = buffers(source, 0, 0, dtype);
        const Format format = with_tensor_scale(format_, b, rows * inputs, threads);
        const int64_t bytes = inputs * (b.dtype == Dtype::float32 ? 4 : 2);
        const DotInput out = Parts(s, m).at(reinterpret_cast<char*>(memory), m);
        parallel_for(useful(threads, rows * inputs), rows, std::max<int64_t>(1, WORTH_A_THREAD / 4 / inputs),
                     [&](int64_t first, int64_t last) {
                         if (!rounder)
                             return kernels.encode(b, format, scaling_, rounding_, s, m, element_.offset, out, first,
                                                   last);
                         std::vector<char> rounded(static_cast<size_t>(bytes));
                         for (int64_t row = first; row < last; ++row) {
                             const char* const x = static_cast<const char*>(b.source) + row * bytes;
                             rounder->round({x, rounded.data(), nullptr, b.dtype}, 0, inputs);
                             kernels.encode({rounded.data() - row * bytes, nullptr, nullptr, b.dtype}, format, scaling_,
                                            rounding_, s, m, element_.offset, out, row, row + 1);
                         }
                     });
        const auto [smallest, largest] = range(out.scales, rows * (s.padded / s.block));
        new (reinterpret_cast<void*>(memory)) Header{&dot, m, smallest, largest};
    }

    // Multiply an activation by a weight whose scales that are not 0 lie in [smallest, largest]. Return false where the
    // product of two scales might be no normal number, and nothing was done.
    bool multiply(uintptr_t memory, int64_t rows, int64_t inputs, uintptr_t elements, uintptr_t scales,
                  uintptr_t scale_of, float unit, int64_t outputs, int64_t row_bytes, float smallest, float largest,
                  uintptr_t target, uintptr_t bias, int dtype, RoundPlan* rounder, int threads) const {
        const nb::gil_scoped_release release;
        char* const start = reinterpret_cast<char*>(memory);
        Header header;
        std::memcpy(&header, start, sizeof header);
        if (header.smallest * smallest < 0x1p-120f || header.largest * largest > 0x1p+100f) return false;
        const DotShape s = shape(rows, inputs);
        const DotInput in = Parts(s, header.method).at(start, header.method);
        const DotWeight w{reinterpret_cast<const uint8_t*>(elements),
                          reinterpret_cast<const uint8_t*>(scales),
                          reinterpret_cast<const float*>(scale_of),
                          unit,
                          outputs,
                          row_bytes};
        const DotOutput out{reinterpret_cast<void*>(target), reinterpret_cast<const void*>(bias),
                            static_cast<Dtype>(dtype)};
        // A unit: a panel of outputs, and as many rows as make unpacking it cheap.
        constexpr int64_t WORK = 1 << 16;
        const int64_t panels = (outputs + PANEL - 1) / PANEL, pieces = (rows + MOST_ROWS - 1) / MOST_ROWS;
        const int64_t grain = std::max<int64_t>(1, WORK / (std::min(rows, MOST_ROWS) * inputs * PANEL));
        parallel_for(useful(threads, rows * inputs * outputs), panels * pieces, grain,
                     [&](int64_t first, int64_t last) {
                         for (int64_t unit = first; unit < last; ++unit) {
                             const int64_t row = unit / panels * MOST_ROWS;
                             header.kernels->multiply(w, element_, header.method, s, in, out, unit % panels, row,
                                                      std::min(rows, row + MOST_ROWS));
                         }
                     });
        if (rounder) rounder->round(buffers(target, target, 0, dtype), rows * outputs, threads);
        return true;
    }

   private:
    DotMethod method(const DotKernels& dot, const DotShape& s) const {
        return dot.method(element_, largest_weight_, largest_input_, s);
    }

    DotShape shape(int64_t rows, int64_t inputs) const {
        const int64_t unit = std::lcm(block_, CODES_READ), padded = (inputs + unit - 1) / unit * unit;
        return {rows, inputs, block_, padded};
    }

    // Return the smallest and the largest of the scales that are neither 0 nor NaN; 1 where there is none.
    static std::tuple<float, float> range(const float* scales, int64_t n) {
        float smallest = std::numeric_limits<float>::infinity(), largest = 0.0f;
        for (int64_t i = 0; i < n; ++i) {
            smallest = scales[i] > 0.0f && scales[i] < smallest ? scales[i] : smallest;
            largest = scales[i] > largest ? scales[i] : largest;
        }
        return largest > 0.0f ? std::tuple{smallest, largest} : std::tuple{1.0f, 1.0f};
    }

    Format format_;
    Scaling scaling_;
    Rounding rounding_;
    int largest_input_, largest_weight_;
    int64_t block_;
    DotElement element_;
};

int64_t rows_together(int64_t length) {
    return std::max<int64_t>(1, WORTH_A_THREAD / 2 / std::max<int64_t>(length, 1));
}

// Quantize rows, and pack their codes; return the scale of the tensor, 1 where the format has none.
float pack(uintptr_t source, int dtype, uintptr_t elements, uintptr_t scales, int64_t rows, int64_t length,
           int64_t block, int64_t row_bytes, int bits, int nan_scale, const Format& given, Scaling scaling,
           Rounding rounding, int threads) {
    const nb::gil_scoped_release release;
    const Kernels& kernels = active_kernels();
    const Buffers b = buffers(source, 0, 0, dtype);
    const Format format = with_tensor_scale(given, b, rows * length, threads);
    const Packing p{reinterpret_cast<uint8_t*>(elements),
                    reinterpret_cast<uint8_t*>(scales),
                    length,
                    block,
                    row_bytes,
                    bits,
                    nan_scale};
    parallel_for(useful(threads, rows * length), rows, rows_together(length),
                 [&](int64_t first, int64_t last) { kernels.pack(b, format, scaling, rounding, p, first, last); });
    return format.tensor_scale == 0.0f ? 1.0f : format.tensor_scale;
}

// Write the values of packed rows: `value_of` has what each code stands for, or is null where they are integers.
void unpack(uintptr_t elements, uintptr_t scales, uintptr_t scale_of, int64_t rows, int64_t length, int64_t block,
            int64_t row_bytes, const DotElement& e, uintptr_t value_of, uintptr_t target, int dtype, int threads) {
    const nb::gil_scoped_release release;
    const DotWeight w{reinterpret_cast<const uint8_t*>(elements),
                      reinterpret_cast<const uint8_t*>(scales),
                      reinterpret_cast<const float*>(scale_of),
                      0.0f,
                      rows,
                      row_bytes};
    const Unpacking u{reinterpret_cast<void*>(target), static_cast<Dtype>(dtype),
                      reinterpret_cast<const float*>(value_of), length, block};
    const DotKernels& kernels = active_dot();
    parallel_for(useful(threads, rows * length), rows, rows_together(length),
                 [&](int64_t first, int64_t last) { kernels.values(w, e, u, first, last); });
}

}  // namespace

void bind_products(nb::module_& m) {
    nb::class_<DotElement>(m, "DotElement")
        .def(
            "__init__",
            [](DotElement* self, int bits, bool is_int, int offset, const std::vector<int>& bytes) {
                new (self) DotElement{bits, is_int, offset, {}};
                for (size_t i = 0; i < bytes.size() && i < 256; ++i) self->bytes[i] = static_cast<uint8_t>(bytes[i]);
            },
            nb::arg("bits"), nb::arg("is_int"), nb::arg("offset"), nb::arg("bytes"));
    m.def("pack", &pack);
    m.def("unpack", &unpack);
    nb::class_<ProductPlan>(m, "ProductPlan")
        .def(nb::init<const Format&, Scaling, Rounding, int, const DotElement&, int, int64_t>(), nb::arg("activation"),
             nb::arg("scaling"), nb::arg("rounding"), nb::arg("largest_input"), nb::arg("weight"),
             nb::arg("largest_weight"), nb::arg("block"))
        .def("bytes", &ProductPlan::bytes)
        .def("encode", &ProductPlan::encode, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg(),
             nb::arg())
        .def("multiply", &ProductPlan::multiply, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
             nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none(),
             nb::arg());
}

}  // namespace mx
