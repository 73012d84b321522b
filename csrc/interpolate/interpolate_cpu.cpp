// interpolate on the CPU: tables of taps, and the choice of instruction set.
#include "interpolate/interpolate.h"

#include <memory>
#include <new>

#include "common/parallel_for.h"
#include "interpolate/rows.h"

namespace segkernels {
namespace {

constexpr std::align_val_t kAlignment{64};  // the pieces of an Arena's

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
    const Memory memory = memory_of(plan, cpu_threads(where));
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
    const Memory memory = memory_of(plan, cpu_threads(where));
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

}  // namespace segkernels
