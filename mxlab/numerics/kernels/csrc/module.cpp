// mxlab.numerics.kernels._native: the CPU kernels for Python. Tensors cross as addresses, so that nothing here depends
// on torch and its binary interface; mxlab/numerics/kernels/native.py checks what it passes.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <climits>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "exact.h"
#include "kernels.h"
#include "module.h"
#include "round_plan.h"
#include "threads.h"

namespace nb = nanobind;

namespace mx {
namespace {

// Return the kernels that this processor can run, the fastest last.
std::vector<const Kernels*> available_kernels() {
    std::vector<const Kernels*> found{&portable_kernels};
#if defined(MX_X86)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
        found.push_back(&avx2_kernels);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd"))
        found.push_back(&avx512_kernels);
#endif
    return found;
}

const Kernels* active = available_kernels().back();

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (const Kernels* k : available_kernels()) names.push_back(k->name);
    return names;
}

void use(const std::string& name) {
    for (const Kernels* k : available_kernels())
        if (name == k->name) {
            active = k;
            return;
        }
    throw std::invalid_argument("this processor has no kernels for " + name);
}

}  // namespace

const Kernels& active_kernels() { return *active; }

Buffers buffers(uintptr_t source, uintptr_t target, uintptr_t noise, int dtype) {
    return {reinterpret_cast<const void*>(source), reinterpret_cast<void*>(target),
            reinterpret_cast<const float*>(noise), static_cast<Dtype>(dtype)};
}

int useful(int threads, int64_t elements) { return elements < WORTH_A_THREAD ? 1 : threads; }

Format with_tensor_scale(Format format, const Buffers& b, int64_t count, int threads) {
    if (format.tensor_scale == 0.0f) return format;
    std::atomic<u32> largest{0};
    parallel_for(useful(threads, count), count, WORTH_A_THREAD / 2, [&](int64_t first, int64_t last) {
        const u32 found = active->largest_finite(b, first, last);
        u32 before = largest.load();
        while (before < found && !largest.compare_exchange_weak(before, found)) {
        }
    });
    format.tensor_scale = portable::exact::tensor_scale(largest, format);
    return format;
}

namespace {

// Return the buffers from an element on; source and target are the same.
Buffers rows_from(const Buffers& b, int64_t first) {
    char* const target = static_cast<char*>(b.target) + first * (b.dtype == Dtype::float32 ? 4 : 2);
    return {target, target, b.noise ? b.noise + first : nullptr, b.dtype};
}

// Call work(first, last) on ranges of rows that fit the first-level cache: TRANSFORMED elements, roughly.
constexpr int64_t TRANSFORMED = 4096;

template <class Work>
void for_rows(const Transform& t, int64_t rows, int threads, const Work& work) {
    if (rows < 1 || t.size < 1 || t.size > MOST_TRANSFORMED || t.axis < 1 || t.axis % t.size != 0) return;
    const int64_t together = std::max<int64_t>(TRANSFORMED / t.axis / 4 * 4, 4);
    parallel_for(useful(threads, rows * t.axis), rows, together, work);
}

void transform(const Buffers& b, const Transform& t, int64_t rows, int threads) {
    const Kernels& kernels = *active;
    for_rows(t, rows, threads, [&](int64_t first, int64_t last) { kernels.transform(b, t, first, last); });
}

// Multiply blocks of rows by matrices, into another tensor of the same type.
void run_transform(uintptr_t source, uintptr_t target, uintptr_t matrices, int dtype, int64_t size, bool is_shared,
                   int64_t rows, int64_t axis, int threads) {
    const nb::gil_scoped_release release;
    const Transform t{reinterpret_cast<const float*>(matrices), axis, size, is_shared};
    transform(buffers(source, target, 0, dtype), t, rows, threads);
}

// Quantize `inputs` inputs of a weight one after the other: see Settling.
void settle(uintptr_t weight, uintptr_t scales, uintptr_t factors, uintptr_t errors, int64_t inputs, int64_t outputs,
            const Element& element, float lowest, Rounding rounding, int threads) {
    const nb::gil_scoped_release release;
    if (inputs < 1 || inputs > MOST_INPUTS || outputs < 1) return;
    const Settling s{reinterpret_cast<float*>(weight),
                     reinterpret_cast<const float*>(scales),
                     reinterpret_cast<const float*>(factors),
                     reinterpret_cast<float*>(errors),
                     inputs,
                     outputs,
                     lowest};
    const Kernels& kernels = *active;
    parallel_for(useful(threads, inputs * outputs), kernels.settle_units(s), 1,
                 [&](int64_t first, int64_t last) { kernels.settle(s, element, rounding, first, last); });
}

// Quantizes tensors to one format.
class QuantizePlan {
   public:
    QuantizePlan(const Format& format, Scaling scaling, Rounding rounding, Numerics numerics)
        : format_(format), scaling_(scaling), rounding_(rounding), numerics_(numerics) {}

    void run(uintptr_t source, uintptr_t target, uintptr_t noise, int dtype, int64_t outer, int64_t axis, int64_t inner,
             int64_t block, int threads) {
        const nb::gil_scoped_release release;
        if (outer < 1 || axis < 1 || inner < 1 || block < 1) return;
        quantize(buffers(source, target, noise, dtype), {outer, axis, inner, block}, threads);
    }

    // Multiply blocks of rows by matrices, and quantize the rows while they are in the cache.
    void run_transformed(uintptr_t source, uintptr_t target, uintptr_t noise, uintptr_t matrices, int dtype,
                         int64_t size, bool is_shared, int64_t rows, int64_t axis, int64_t block, int threads) {
        const nb::gil_scoped_release release;
        const Buffers b = buffers(source, target, noise, dtype), made = buffers(target, target, noise, dtype);
        const Transform t{reinterpret_cast<const float*>(matrices), axis, size, is_shared};
        if (format_.tensor_scale != 0.0f) {  // all rows decide on the scale of each
            transform(b, t, rows, threads);
            return quantize(made, {rows, axis, 1, block}, threads);
        }
        const Job job(*this, *active, b.dtype);
        for_rows(t, rows, threads, [&](int64_t first, int64_t last) {
            job.kernels.transform(b, t, first, last);
            const Layout layout{last - first, axis, 1, block};
            job.run(rows_from(made, first * axis), layout, format_, 0, job.kernels.quantize_units(layout));
        });
    }

   private:
    // What the ranges of a job have in common.
    struct Job {
        const QuantizePlan& plan;
        const Kernels& kernels;
        const bool exact;
        const u32* const table;

        Job(QuantizePlan& p, const Kernels& k, Dtype dtype)
            : plan(p),
              kernels(k),
              exact(p.numerics_ == Numerics::exact),
              table(!exact && has_table(dtype, p.rounding_) ? p.table_for(dtype) : nullptr) {}

        void run(const Buffers& b, const Layout& layout, const Format& format, int64_t first, int64_t last) const {
            if (exact)
                kernels.quantize_exact(b, layout, format, plan.scaling_, plan.rounding_, first, last);
            else
                kernels.quantize_microxcaling(b, layout, format, plan.rounding_, table, first, last);
        }
    };

    void quantize(const Buffers& b, const Layout& layout, int threads) {
        const int64_t count = layout.outer * layout.axis * layout.inner;
        const Job job(*this, *active, b.dtype);
        const Format format = with_tensor_scale(format_, b, count, threads);
        parallel_for(useful(threads, count), job.kernels.quantize_units(layout), 2,
                     [&](int64_t first, int64_t last) { job.run(b, layout, format, first, last); });
    }

    const u32* table_for(Dtype dtype) {
        return tables_.get(dtype, [&](u32* t) { active->microxcaling_table(t, dtype, format_.element, rounding_); });
    }

    Format format_;
    Scaling scaling_;
    Rounding rounding_;
    Numerics numerics_;
    Tables<u32> tables_;
};

void uniform(uintptr_t target, int64_t count, uint64_t seed, int threads) {
    const nb::gil_scoped_release release;
    const Kernels& kernels = *active;
    parallel_for(useful(threads, count), count, WORTH_A_THREAD / 2, [&](int64_t first, int64_t last) {
        kernels.uniform(reinterpret_cast<float*>(target), seed, first, last);
    });
}

}  // namespace
}  // namespace mx

NB_MODULE(_native, m) {
    using namespace mx;
    nb::enum_<Dtype>(m, "Dtype")
        .value("float32", Dtype::float32)
        .value("bfloat16", Dtype::bfloat16)
        .value("float16", Dtype::float16);
    nb::enum_<Numerics>(m, "Numerics").value("exact", Numerics::exact).value("microxcaling", Numerics::microxcaling);
    nb::enum_<Rounding>(m, "Rounding")
        .value("nearest", Rounding::nearest)
        .value("nearest_zero", Rounding::nearest_zero)
        .value("even", Rounding::even)
        .value("floor", Rounding::floor)
        .value("dither", Rounding::dither);
    nb::enum_<Scaling>(m, "Scaling")
        .value("power", Scaling::power)
        .value("asymmetric", Scaling::asymmetric)
        .value("searched", Scaling::searched)
        .value("floating", Scaling::floating);
    nb::class_<Element>(m, "Element")
        .def(
            "__init__",
            [](Element* self, int mantissa_bits, int emax, double min_normal, double max, bool is_int) {
                new (self)
                    Element{mantissa_bits, emax, static_cast<float>(min_normal), static_cast<float>(max), is_int};
            },
            nb::arg("mantissa_bits"), nb::arg("emax"), nb::arg("min_normal"), nb::arg("max"), nb::arg("is_int"));
    nb::class_<Format>(m, "Format")
        .def(
            "__init__",
            [](Format* self, const Element& element, int scale_emax, bool flush, u32 carry, const Element& scale,
               bool per_tensor) {
                new (self) Format{element, scale_emax, flush ? -126 : INT_MIN, carry, scale, per_tensor ? 1.0f : 0.0f};
            },
            nb::arg("element"), nb::arg("scale_emax"), nb::arg("flush_fp32_subnorms"), nb::arg("carry"),
            nb::arg("scale"), nb::arg("per_tensor"));
    nb::class_<QuantizePlan>(m, "QuantizePlan")
        .def(nb::init<const Format&, Scaling, Rounding, Numerics>(), nb::arg("format"), nb::arg("scaling"),
             nb::arg("rounding"), nb::arg("numerics"))
        .def("run", &QuantizePlan::run)
        .def("run_transformed", &QuantizePlan::run_transformed);
    nb::class_<RoundPlan>(m, "RoundPlan")
        .def(nb::init<const Element&, Rounding, bool, Numerics>(), nb::arg("element"), nb::arg("rounding"),
             nb::arg("subnormals"), nb::arg("numerics"))
        .def("run", &RoundPlan::run);
    bind_products(m);
    bind_attend(m);
    m.def("uniform", &uniform);
    m.def("transform", &run_transform);
    m.def("settle", &settle);
    m.def(
        "adopt_openmp", [](const std::string& path) { return adopt_openmp(path.c_str()); }, nb::arg("path"),
        "Use the threads of the GNU OpenMP runtime at a path, if it is loaded; return whether it is.");
    m.def("instruction_sets", &instruction_sets,
          "Return the instruction sets that this processor can run, the fastest last.");
    m.def(
        "instruction_set", [] { return std::string(active->name); },
        "Return the instruction set that the kernels use now.");
    m.def("use", &use, nb::arg("name"), "Use another instruction set, to compare them.");
}
