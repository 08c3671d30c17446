// What an attention multiplies by packed keys and values, for Python: see attend.h.
#include <algorithm>
#include <vector>

#include "dot.h"
#include "module.h"
#include "threads.h"

namespace nb = nanobind;

namespace mx {
namespace {

constexpr int64_t CHUNK = 256;  // tokens of a head that are one unit of work

// Codes [batch, heads, tokens, row_bytes] with scales [batch, heads, tokens, blocks], of which the last two axes are
// dense: as a cache has them, with room for more tokens.
class PackedHeads {
   public:
    PackedHeads(uintptr_t elements, uintptr_t scales, uintptr_t scale_of, const DotElement& element, uintptr_t value_of,
                int64_t batch, int64_t heads, int64_t tokens, int64_t length, int64_t block, int64_t row_bytes,
                int64_t element_batch, int64_t element_head, int64_t scale_batch, int64_t scale_head)
        : all_{reinterpret_cast<const uint8_t*>(elements),
               reinterpret_cast<const uint8_t*>(scales),
               reinterpret_cast<const float*>(scale_of),
               0.0f,
               tokens,
               row_bytes},
          element_(element),
          value_of_(reinterpret_cast<const float*>(value_of)),
          batch_(batch),
          heads_(heads),
          length_(length),
          block_(block),
          element_batch_(element_batch),
          element_head_(element_head),
          scale_batch_(scale_batch),
          scale_head_(scale_head) {}

    // Multiply queries [batch, heads, rows, length] by the tokens; `target` is [batch, heads, rows, tokens].
    void score(uintptr_t queries, int64_t rows, uintptr_t target, int threads) const {
        const nb::gil_scoped_release release;
        const DotKernels& kernels = active_dot();
        const int64_t tokens = all_.outputs;
        for_chunks(rows, threads, [&](const DotWeight& w, int64_t head, int64_t first) {
            kernels.score(w, element_,
                          {at(queries) + head * rows * length_, at(target) + head * rows * tokens + first, rows,
                           length_, tokens, value_of_, length_, block_});
        });
    }

    // Add up the tokens, times factors [batch, heads, rows, tokens]; `target` is [batch, heads, rows, length].
    void mix(uintptr_t factors, int64_t rows, uintptr_t target, int threads) const {
        const nb::gil_scoped_release release;
        const DotKernels& kernels = active_dot();
        const int64_t tokens = all_.outputs, sum = rows * length_;
        std::vector<float> sums(static_cast<size_t>(batch_ * heads_ * chunks() * sum));
        for_chunks(rows, threads, [&](const DotWeight& w, int64_t head, int64_t first) {
            kernels.mix(
                w, element_,
                {at(factors) + head * rows * tokens + first, sums.data() + (head * chunks() + first / CHUNK) * sum,
                 rows, tokens, length_, value_of_, length_, block_});
        });
        for (int64_t head = 0; head < batch_ * heads_; ++head) {
            float* const out = at(target) + head * sum;
            std::fill_n(out, sum, 0.0f);
            for (int64_t c = 0; c < chunks(); ++c)
                for (int64_t i = 0; i < sum; ++i) out[i] += sums[(head * chunks() + c) * sum + i];
        }
    }

   private:
    static float* at(uintptr_t address) { return reinterpret_cast<float*>(address); }

    int64_t chunks() const { return (all_.outputs + CHUNK - 1) / CHUNK; }

    // Call work(tokens, head, first) for the tokens of each chunk of each head, from `first` on.
    template <class Work>
    void for_chunks(int64_t rows, int threads, Work work) const {
        const int64_t blocks = (length_ + block_ - 1) / block_, units = batch_ * heads_ * chunks();
        parallel_for(useful(threads, units * CHUNK * length_ * rows), units, 1, [&](int64_t begin, int64_t end) {
            for (int64_t unit = begin; unit < end; ++unit) {
                const int64_t head = unit / chunks(), first = unit % chunks() * CHUNK;
                DotWeight w = all_;
                w.elements += head / heads_ * element_batch_ + head % heads_ * element_head_ + first * w.row_bytes;
                w.scales += head / heads_ * scale_batch_ + head % heads_ * scale_head_ + first * blocks;
                w.outputs = std::min(CHUNK, w.outputs - first);
                work(w, head, first);
            }
        });
    }

    DotWeight all_;
    DotElement element_;
    const float* value_of_;
    int64_t batch_, heads_, length_, block_, element_batch_, element_head_, scale_batch_, scale_head_;
};

}  // namespace

void bind_attend(nb::module_& m) {
    nb::class_<PackedHeads>(m, "PackedHeads")
        .def(nb::init<uintptr_t, uintptr_t, uintptr_t, const DotElement&, uintptr_t, int64_t, int64_t, int64_t, int64_t,
                      int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>())
        .def("score", &PackedHeads::score)
        .def("mix", &PackedHeads::mix);
}

}  // namespace mx
