// Losses of upsampled logits on the CPU: builds the tables of taps and calls the loops of
// upsample_cross_entropy.simd.cpp.
#include "common/parallel_for.h"
#include "upsample_cross_entropy/loss_tables.h"

namespace segkernels {
namespace {

template <class A>
void fill_readers(const LossTables<A>& tables) {
  const LogitTables<A>& l = tables.logits;
  with_taps(l.taps, [&](auto taps) {
    constexpr int K = taps.value;
    cpu::fill<K>(l.x, tables.x_readers);
    for (int32_t j = 0; j < l.y.in; ++j) {
      tables.y_begin[j] = first_reader<K>(l.y, j);
      tables.y_end[j] = last_reader<K>(l.y, j);
    }
  });
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
  to[0] = A(call.reduction == Reduction::kMean ? mean_loss(loss, weight) : loss);
  to[1] = A(weight);
  to[2] = A(classes);
}

}  // namespace

int64_t upsample_loss_workspace(const Where& where, const LossCall& call, bool backward) {
  Arena arena(nullptr);
  with_computing_type(call.type, [&](auto scalar) {
    LossTables<decltype(scalar)>(call).allocate(arena, cpu_threads(where), backward);
  });
  return arena.used();
}

void upsample_loss_cpu(const Where& where, const LossCall& call, const LossOutputs& to) {
  with_computing_type(call.type, [&](auto scalar) {
    using A = decltype(scalar);
    LossTables<A> tables(call);
    Arena arena(to.workspace);
    tables.allocate(arena, cpu_threads(where), false);
    tables.logits.fill();
    with_best_isa([&](auto isa) { LossLoops<isa.value, A>::forward(where, call, to, tables); });
    double loss = 0, weight = 0;
    for (int64_t row = 0; row < call.resampling.planes * call.resampling.out_height; ++row) {
      loss += tables.partial[2 * row];
      weight += tables.partial[2 * row + 1];
    }
    set_totals<A>(call, loss, weight, to.totals);
  });
}

void upsample_loss_backward_cpu(const Where& where, const LossCall& call, const LossGradient& g) {
  with_computing_type(call.type, [&](auto scalar) {
    using A = decltype(scalar);
    LossTables<A> tables(call);
    Arena arena(g.workspace);
    tables.allocate(arena, cpu_threads(where), true);
    tables.logits.fill();
    fill_readers(tables);
    with_best_isa([&](auto isa) { LossLoops<isa.value, A>::backward(where, call, g, tables); });
  });
}

}  // namespace segkernels
