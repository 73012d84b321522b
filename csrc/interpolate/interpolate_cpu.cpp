// interpolate on the CPU: tables of taps, the choice of instruction set, and the CUDA kernels'
// functors run by loops (for tests).
#include "interpolate/interpolate.h"

#include <memory>
#include <new>

#include "common/parallel_for.h"
#include "interpolate/rows.h"

namespace segkernels {
namespace {

constexpr std::align_val_t kAlignment{64};  // the pieces of an Arena's

int threads_of(const Where& where) { return where.threads > 1 ? where.threads : 1; }

struct Freed {
  void operator()(void* data) const { ::operator delete(data, kAlignment); }
};
using Memory = std::unique_ptr<void, Freed>;

// What the plan's tables and rows lie in.
template <class Plan>
Memory memory_of(Plan& plan, int threads) {
  Arena counting(nullptr);
  plan.take(counting, threads);
  Memory memory(::operator new(size_t(counting.used()), kAlignment));
  Arena arena(memory.get());
  plan.take(arena, threads);
  return memory;
}

}  // namespace

void interpolate_cpu(const Where& where, const Resampling& r, ScalarType type, const void* input,
                     void* output) {
  with_scalar_type(type, [&](auto scalar) {
    using T = decltype(scalar);
    using A = Acc<T>;
    ForwardRows<A> plan{r.geometry<A>(), {}, {}, nullptr, nullptr, r.taps()};
    const Memory memory = memory_of(plan, threads_of(where));
    with_taps(r, [&](auto taps) {
      cpu::fill<taps.value>(plan.g.y, plan.y);
      cpu::fill<taps.value>(plan.g.x, plan.x);
    });
    with_best_isa([&](auto isa) {
      InterpolateRows<isa.value, T>::forward(where, plan, static_cast<const T*>(input),
                                             static_cast<T*>(output));
    });
  });
}

void interpolate_backward_cpu(const Where& where, const Resampling& r, ScalarType type,
                              const void* grad_output, void* grad_input) {
  with_scalar_type(type, [&](auto scalar) {
    using T = decltype(scalar);
    using A = Acc<T>;
    BackwardRows<A> plan{};
    plan.g = r.geometry<A>();
    plan.taps = r.taps();
    const Memory memory = memory_of(plan, threads_of(where));
    with_taps(r, [&](auto taps) {
      cpu::fill<taps.value>(plan.g.y, plan.y);
      cpu::fill<taps.value>(plan.g.x, plan.x);
    });
    plan.pad();
    with_best_isa([&](auto isa) {
      InterpolateRows<isa.value, T>::backward(where, plan, static_cast<const T*>(grad_output),
                                              static_cast<T*>(grad_input));
    });
  });
}

void interpolate_plain(const Where& where, const Resampling& r, ScalarType type, const void* input,
                       void* output, int rows) {
  with_scalar_type(type, [&](auto scalar) {
    using T = decltype(scalar);
    with_taps(r, [&](auto taps) {
      const auto g = r.geometry<Acc<T>>();
      const int32_t lanes = lanes_of<T, taps.value>(g);
      const Forward<T, taps.value> f{g,    static_cast<const T*>(input), static_cast<T*>(output),
                                     rows, (g.y.out + rows - 1) / rows,  lanes};
      parallel_for(where, f.count(), f, "interpolate_plain");
    });
  });
}

void interpolate_backward_plain(const Where& where, const Resampling& r, ScalarType type,
                                const void* grad_output, void* grad_input, void* workspace,
                                bool direct) {
  with_scalar_type(type, [&](auto scalar) {
    using T = decltype(scalar);
    with_taps(r, [&](auto taps) {
      const auto g = r.geometry<Acc<T>>();
      const T* grad = static_cast<const T*>(grad_output);
      if (direct) {
        const BackwardDirect<T, taps.value> f{g, grad, static_cast<T*>(grad_input)};
        return parallel_for(where, f.count(), f, "interpolate_backward_plain");
      }
      const Backward<T, taps.value> f{g, tiling_of(g, taps.value), grad,
                                      static_cast<T*>(grad_input)};
      for (int64_t i = 0; i < f.tiles(); ++i) {
        const Tile tile = f.tile(i);
        Acc<T>* sums = static_cast<Acc<T>*>(workspace);
        for (int e = 0; e < f.columns(); ++e) f.column(tile, e, sums);
        for (int e = 0; e < f.cells(); ++e) f.cell(tile, e, sums);
      }
    });
  });
}

}  // namespace segkernels
