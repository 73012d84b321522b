// interpolate on the CPU: builds the tables of taps and calls the loops of interpolate.simd.cpp.
#include "interpolate/interpolate.h"

#include <memory>
#include <new>

#include "common/parallel_for.h"
#include "interpolate/interpolate_cpu.h"

namespace segkernels {
namespace {

constexpr std::align_val_t kAlignment{64};  // of an Arena's allocations

struct Freed {
  void operator()(void* data) const { ::operator delete(data, kAlignment); }
};
using Memory = std::unique_ptr<void, Freed>;

// Allocates the memory of the tables.
template <class Tables>
Memory memory_of(Tables& tables, int threads) {
  Arena counting(nullptr);
  tables.allocate(counting, threads);
  Memory memory(::operator new(size_t(counting.used()), kAlignment));
  Arena arena(memory.get());
  tables.allocate(arena, threads);
  return memory;
}

}  // namespace

void interpolate_cpu(const Where& where, const Resampling& r, ScalarType type, const void* input,
                     void* output) {
  with_scalar_type(type, [&](auto scalar) {
    using T = decltype(scalar);
    using A = Acc<T>;
    ForwardTables<A> tables{r.geometry<A>(), {}, {}, nullptr, nullptr, r.taps()};
    const Memory memory = memory_of(tables, cpu_threads(where));
    with_taps(r, [&](auto taps) {
      cpu::fill<taps.value>(tables.g.y, tables.y);
      cpu::fill<taps.value>(tables.g.x, tables.x);
    });
    with_best_isa([&](auto isa) {
      InterpolateLoops<isa.value, T>::forward(where, tables, static_cast<const T*>(input),
                                              static_cast<T*>(output));
    });
  });
}

void interpolate_backward_cpu(const Where& where, const Resampling& r, ScalarType type,
                              const void* grad_output, void* grad_input) {
  with_scalar_type(type, [&](auto scalar) {
    using T = decltype(scalar);
    using A = Acc<T>;
    BackwardTables<A> tables{};
    tables.g = r.geometry<A>();
    tables.taps = r.taps();
    const Memory memory = memory_of(tables, cpu_threads(where));
    with_taps(r, [&](auto taps) {
      cpu::fill<taps.value>(tables.g.y, tables.y);
      cpu::fill<taps.value>(tables.g.x, tables.x);
    });
    tables.pad();
    with_best_isa([&](auto isa) {
      InterpolateLoops<isa.value, T>::backward(where, tables, static_cast<const T*>(grad_output),
                                               static_cast<T*>(grad_input));
    });
  });
}

}  // namespace segkernels
