// Losses of upsampled logits on the CPU: tables of taps, and the choice of instruction set.
#include "common/parallel_for.h"
#include "upsample_cross_entropy/rows.h"

namespace segkernels {
namespace {

template <class T>
LossPlan<T> plan_of(const LossCall& call) {
  LossPlan<T> plan{};
  plan.logits.logits = logits_of<T>(call);
  plan.logits.taps = call.resampling.taps();
  return plan;
}

template <int K, class T>
void fill_tables(const LossPlan<T>& plan, bool backward) {
  const Logits<T>& l = plan.logits.logits;
  cpu::fill<K>(l.y, plan.logits.y);
  cpu::fill<K>(l.x, plan.logits.x);
  if (!backward) return;
  cpu::fill<K>(l.x, plan.x_readers);
  for (int32_t j = 0; j < l.y.in; ++j) {
    plan.y_begin[j] = first_reader<K>(l.y, j);
    plan.y_end[j] = last_reader<K>(l.y, j);
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
    auto plan = plan_of<decltype(scalar)>(call);
    plan.take(arena, cpu_threads(where), backward);
  });
  return arena.used();
}

void upsample_loss_cpu(const Where& where, const LossCall& call, const LossOutputs& to,
                       void* workspace) {
  with_scalar_type(call.type, [&](auto scalar) {
    using T = decltype(scalar);
    auto plan = plan_of<T>(call);
    Arena arena(workspace);
    plan.take(arena, cpu_threads(where), false);
    with_taps(call.resampling, [&](auto taps) { fill_tables<taps.value>(plan, false); });
    with_best_isa([&](auto isa) { LossRows<isa.value, T>::forward(where, call, to, plan); });
    double loss = 0, weight = 0;
    for (int64_t row = 0; row < call.resampling.planes * call.resampling.out_height; ++row) {
      loss += plan.partial[2 * row];
      weight += plan.partial[2 * row + 1];
    }
    set_totals<Acc<T>>(call, loss, weight, to.totals);
  });
}

void upsample_loss_backward_cpu(const Where& where, const LossCall& call, const LossGradient& g,
                                void* workspace) {
  with_scalar_type(call.type, [&](auto scalar) {
    using T = decltype(scalar);
    auto plan = plan_of<T>(call);
    Arena arena(workspace);
    plan.take(arena, cpu_threads(where), true);
    with_taps(call.resampling, [&](auto taps) { fill_tables<taps.value>(plan, true); });
    with_best_isa([&](auto isa) { LossRows<isa.value, T>::backward(where, call, g, plan); });
  });
}

}  // namespace segkernels
