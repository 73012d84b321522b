// Losses of upsampled logits on the CPU: builds the tables of taps and calls the loops of
// upsample_cross_entropy.simd.cpp.
#include "common/parallel_for.h"
#include "upsample_cross_entropy/loss_tables.h"

namespace segkernels {
namespace {

template <class T>
LossTables<T> tables_of(const LossCall& call) {
  LossTables<T> tables{};
  tables.logits.logits = logits_of<T>(call);
  tables.logits.taps = call.resampling.taps();
  return tables;
}

template <int K, class T>
void fill_tables(const LossTables<T>& tables, bool backward) {
  const Logits<T>& l = tables.logits.logits;
  cpu::fill<K>(l.y, tables.logits.y);
  cpu::fill<K>(l.x, tables.logits.x);
  if (!backward) return;
  cpu::fill<K>(l.x, tables.x_readers);
  for (int32_t j = 0; j < l.y.in; ++j) {
    tables.y_begin[j] = first_reader<K>(l.y, j);
    tables.y_end[j] = last_reader<K>(l.y, j);
  }
}

template <class A>
void set_totals(const LossCall& call, double loss, double weight, void* totals) {
  double classes = call.classes;
  if (call.weight != nullptr && !call.binary) {
    classes = 0;
    for (int32_t c = 0; c < call.classes; ++c)
      classes += double(static_cast<const A*>(call.weight)[c]);
  }
  A* to = static_cast<A*>(totals);
  to[0] = A(call.reduction == Reduction::kMean ? loss / weight : loss);
  to[1] = A(weight);
  to[2] = A(classes);
}

}  // namespace

int64_t upsample_loss_workspace(const Where& where, const LossCall& call, bool backward) {
  Arena arena(nullptr);
  with_scalar_type(call.type, [&](auto scalar) {
    auto tables = tables_of<decltype(scalar)>(call);
    tables.allocate(arena, cpu_threads(where), backward);
  });
  return arena.used();
}

void upsample_loss_cpu(const Where& where, const LossCall& call, const LossOutputs& to) {
  with_scalar_type(call.type, [&](auto scalar) {
    using T = decltype(scalar);
    auto tables = tables_of<T>(call);
    Arena arena(to.workspace);
    tables.allocate(arena, cpu_threads(where), false);
    with_taps(call.resampling, [&](auto taps) { fill_tables<taps.value>(tables, false); });
    with_best_isa([&](auto isa) { LossLoops<isa.value, T>::forward(where, call, to, tables); });
    double loss = 0, weight = 0;
    for (int64_t row = 0; row < call.resampling.planes * call.resampling.out_height; ++row) {
      loss += tables.partial[2 * row];
      weight += tables.partial[2 * row + 1];
    }
    set_totals<Acc<T>>(call, loss, weight, to.totals);
  });
}

void upsample_loss_backward_cpu(const Where& where, const LossCall& call, const LossGradient& g) {
  with_scalar_type(call.type, [&](auto scalar) {
    using T = decltype(scalar);
    auto tables = tables_of<T>(call);
    Arena arena(g.workspace);
    tables.allocate(arena, cpu_threads(where), true);
    with_taps(call.resampling, [&](auto taps) { fill_tables<taps.value>(tables, true); });
    with_best_isa([&](auto isa) { LossLoops<isa.value, T>::backward(where, call, g, tables); });
  });
}

}  // namespace segkernels
