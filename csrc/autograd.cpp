// The ops of ops.cpp over the two halves of seq_loss.h: autograd, and weights that are balanced on the way.
#include <ATen/ATen.h>
#include <ATen/SavedTensorHooks.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "seq_loss.h"

namespace amn {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

TermList term_list(at::IntArrayRef terms, at::IntArrayRef monitored) {
  TORCH_CHECK(terms.size() <= kMaxTerms, "at most ", kMaxTerms, " terms, got ", terms.size());
  TermList list;
  for (const int64_t term : terms) {
    TORCH_CHECK(term >= 0 && term < kMaxTerms, "terms must be in [0, ", kMaxTerms, "), got ", term);
    list.term[list.size] = term;
    list.differentiable[list.size++] = std::find(monitored.begin(), monitored.end(), term) == monitored.end();
  }
  return list;
}

// The running state of balanced weights, and how they are formed; see `balance` in primitives.h.
struct Balance {
  Tensor mean, updates, calls, skipped, lambdas, most;
  BalanceOptions options;
};

std::tuple<Tensor, Tensor> balance(
    const Tensor& values, const Tensor& gram, const Tensor& mean, const Tensor& updates, const Tensor& calls,
    const Tensor& skipped, const Tensor& lambdas, const Tensor& most, int64_t anchor, double decay,
    int64_t update_every, bool by_value, bool update) {
  const Tensor weights = at::empty_like(values), loss = at::empty({}, values.options());
  const BalanceOptions options{anchor, decay, update_every, by_value, update};
  primitives_for(values).balance(values, gram, mean, updates, calls, skipped, lambdas, most, options, weights, loss);
  return {weights, loss};
}

// The schemas take every option by itself; here they become one object.
Options make_options(
    at::IntArrayRef terms, at::IntArrayRef monitored, double temperature, const OptionalTensor& learned_temperature,
    bool both, int64_t negatives, bool positives_by_id, double margin, double variance_target) {
  if (learned_temperature.has_value() && learned_temperature->defined()) {
    const at::ScalarType dtype = learned_temperature->scalar_type();
    TORCH_CHECK(
        dtype == at::kFloat || dtype == at::kDouble, "learned_temperature must be float32 or float64, got ", dtype);
  }
  return {term_list(terms, monitored), {temperature, learned_temperature.value_or(Tensor())}, {both, positives_by_id},
          negatives, margin, variance_target};
}

Forward seq_loss_forward(
    const Tensor& pred, const Tensor& target, const OptionalTensor& weights, const OptionalTensor& mask,
    const OptionalTensor& ids, const OptionalTensor& extra_negatives, const OptionalTensor& learned_temperature,
    at::IntArrayRef terms, at::IntArrayRef monitored, double temperature, bool both, int64_t negatives,
    bool positives_by_id, double margin, double variance_target, int64_t chunk_bytes, int64_t needs) {
  const Options options = make_options(
      terms, monitored, temperature, learned_temperature, both, negatives, positives_by_id, margin, variance_target);
  return forward(
      options, pred, target, weights.value_or(Tensor()), mask.value_or(Tensor()), ids.value_or(Tensor()),
      extra_negatives.value_or(Tensor()), chunk_bytes, needs);
}

Incoming incoming_of(
    const OptionalTensor& grad_loss, const OptionalTensor& weights, const OptionalTensor& grad_values,
    at::ScalarType real) {
  const auto in_real = [&](const OptionalTensor& x) {
    return x.has_value() && x->defined() ? x->to(real).contiguous() : Tensor();
  };
  return {in_real(grad_loss), in_real(weights), in_real(grad_values)};
}

// mask and ids are in the scalars already; the arguments serve the double backward, registered in Python.
std::vector<Tensor> seq_loss_backward(
    const OptionalTensor& grad_loss, const OptionalTensor& weights, const OptionalTensor& grad_values,
    const Tensor& pred, const Tensor& target, const OptionalTensor& mask, const OptionalTensor& ids,
    const OptionalTensor& extra_negatives, const OptionalTensor& learned_temperature, const Tensor& rows,
    const Tensor& attention, const Tensor& columns, at::IntArrayRef terms, at::IntArrayRef monitored,
    double temperature, bool both, int64_t negatives, bool positives_by_id, double margin, double variance_target,
    int64_t needs) {
  const Options options = make_options(
      terms, monitored, temperature, learned_temperature, both, negatives, positives_by_id, margin, variance_target);
  return backward(
      options, incoming_of(grad_loss, weights, grad_values, attention.scalar_type()), pred, target,
      extra_negatives.value_or(Tensor()), rows, attention, columns, needs, /*reuses_attention=*/false);
}

// The dispatcher's handles, so that tracing sees these as ops.
const auto& forward_op() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("amn_kernels::_seq_loss_forward", "")
                             .typed<decltype(seq_loss_forward)>();
  return op;
}

const auto& backward_op() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("amn_kernels::_seq_loss_backward", "")
                             .typed<decltype(seq_loss_backward)>();
  return op;
}

const auto& balance_op() {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("amn_kernels::_balance", "").typed<decltype(balance)>();
  return op;
}

// Whether somebody follows the ops: a mode (tracing, fake tensors), or a tensor that is more than memory of a device.
bool are_observed(const variable_list& tensors) {
  constexpr auto kOfAutograd = c10::autograd_dispatch_keyset_with_ADInplaceOrView | c10::autocast_dispatch_keyset;
  const auto is_plain = [&](const Tensor& x) {
    const auto key = x.defined() ? (x.key_set() - kOfAutograd).highestPriorityTypeId() : c10::DispatchKey::CPU;
    return key == c10::DispatchKey::CPU || key == c10::DispatchKey::CUDA;
  };
  return c10::impl::dispatch_mode_enabled() || !std::all_of(tensors.begin(), tensors.end(), is_plain);
}

// Whether hooks get what is saved now, and may hold it.
bool saving_is_hooked() { return !at::SavedTensorDefaultHooks::get_tls_state().stack.empty(); }

// Whether the node that runs, which has unpacked what it saved without hooks into x, is the last one to see it: the
// graph goes, and nobody else holds it.
bool is_last_use(const Tensor& x) {
  return !torch::autograd::get_current_graph_task_keep_graph() && x.use_count() <= 2 && x.storage().use_count() == 1;
}

bool needs_gradient(const OptionalTensor& x) { return x.has_value() && x->defined() && x->requires_grad(); }

// The results of a call: loss [], values [m], Gram matrix, metrics, weights [m], and what the backward needs.
struct Results {
  Tensor loss, values, gram, metrics, weights, rows, attention, columns;
};

// The forward half, below autograd. `weights` are the fixed ones; with `state` they are balanced here.
Results run_forward(
    const Tensor& pred, const Tensor& target, const OptionalTensor& weights, const Balance* state,
    const OptionalTensor& mask, const OptionalTensor& ids, const OptionalTensor& extra_negatives,
    const OptionalTensor& learned_temperature, at::IntArrayRef terms, at::IntArrayRef monitored, double temperature,
    bool both, int64_t negatives, bool positives_by_id, double margin, double variance_target, int64_t chunk_bytes,
    int64_t needs) {
  auto [loss, values, gram, metrics, rows, attention, columns] = forward_op().call(
      pred, target, weights, mask, ids, extra_negatives, learned_temperature, terms, monitored, temperature, both,
      negatives, positives_by_id, margin, variance_target, chunk_bytes, needs);
  Tensor applied = weights.value_or(Tensor());
  if (state != nullptr) {
    const BalanceOptions& o = state->options;
    std::tie(applied, loss) = balance_op().call(
        values, gram, state->mean, state->updates, state->calls, state->skipped, state->lambdas, state->most, o.anchor,
        o.decay, o.update_every, o.by_value, o.update);
  }
  return {loss, values, gram, metrics, applied, rows, attention, columns};
}

// Loss and values, which have a gradient, are outputs of the node; what has none is left in `results` alone.
class SeqLoss : public torch::autograd::Function<SeqLoss> {
 public:
  static variable_list forward(
      AutogradContext* ctx, Results* results, const Tensor& pred, const Tensor& target, const OptionalTensor& weights,
      const Balance* state, const OptionalTensor& mask, const OptionalTensor& ids,
      const OptionalTensor& extra_negatives, const OptionalTensor& learned_temperature, at::IntArrayRef terms,
      at::IntArrayRef monitored, double temperature, bool both, int64_t negatives, bool positives_by_id, double margin,
      double variance_target, int64_t chunk_bytes, int64_t needs) {
    at::AutoDispatchBelowADInplaceOrView below;
    const Results& out = *results = run_forward(
        pred, target, weights, state, mask, ids, extra_negatives, learned_temperature, terms, monitored, temperature,
        both, negatives, positives_by_id, margin, variance_target, chunk_bytes, needs);
    ctx->save_for_backward(
        {pred, target, out.weights, mask.value_or(Tensor()), ids.value_or(Tensor()),
         extra_negatives.value_or(Tensor()), learned_temperature.value_or(Tensor()), out.rows, out.attention,
         out.columns});
    ctx->saved_data["terms"] = terms;
    ctx->saved_data["monitored"] = monitored;
    ctx->saved_data["numbers"] = std::vector<double>{temperature, margin, variance_target};
    ctx->saved_data["choices"] = std::vector<int64_t>{both, negatives, positives_by_id, needs, saving_is_hooked()};
    ctx->set_materialize_grads(false);  // the values seldom get a gradient; zeros for them would be made in vain
    return {out.loss, out.values};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list result(kInputs);
    if (!grads[0].defined() && !grads[1].defined()) return result;
    const std::vector<int64_t> terms = ctx->saved_data["terms"].toIntVector();
    const std::vector<int64_t> monitored = ctx->saved_data["monitored"].toIntVector();
    // References, as is_last_use counts who holds a tensor.
    const auto saved = ctx->get_saved_variables();
    const Tensor &pred = saved[0], &target = saved[1], &weights = saved[2], &mask = saved[3], &ids = saved[4];
    const Tensor &extra_negatives = saved[5], &learned_temperature = saved[6];
    const Tensor &rows = saved[7], &attention = saved[8], &columns = saved[9];
    const std::vector<double> numbers = ctx->saved_data["numbers"].toDoubleVector();
    const double temperature = numbers[0], margin = numbers[1], variance_target = numbers[2];
    const std::vector<int64_t> choices = ctx->saved_data["choices"].toIntVector();
    const bool both = choices[0] != 0, positives_by_id = choices[2] != 0, hooked = choices[4] != 0;
    const int64_t negatives = choices[1], needs = choices[3];
    const auto optional = [](const Tensor& x) { return x.defined() ? OptionalTensor(x) : std::nullopt; };
    const auto gradients = [&] {
      return backward_op().call(
          optional(grads[0]), optional(weights), optional(grads[1]), pred, target, optional(mask), optional(ids),
          optional(extra_negatives), optional(learned_temperature), rows, attention, columns, terms, monitored,
          temperature, both, negatives, positives_by_id, margin, variance_target, needs);
    };
    std::vector<Tensor> out;
    if (at::GradMode::is_enabled()) {
      out = gradients();  // create_graph: the op's own autograd formula, registered in Python, goes on from here
    } else if (at::AutoDispatchBelowADInplaceOrView below; are_observed(saved) || are_observed(grads)) {
      out = gradients();
    } else {
      const Options options = make_options(
          terms, monitored, temperature, learned_temperature, both, negatives, positives_by_id, margin,
          variance_target);
      out = amn::backward(
          options, incoming_of(grads[0], weights, grads[1], attention.scalar_type()), pred, target, extra_negatives,
          rows, attention, columns, needs, /*reuses_attention=*/!hooked && is_last_use(attention));
    }
    // Positions of pred, target, extra_negatives and learned_temperature among the inputs.
    constexpr int64_t kPosition[] = {1, 2, 7, 8};
    auto next = out.begin();
    for (int64_t i = 0; i < 4; ++i) {
      if (needs & (1 << i)) result[kPosition[i]] = *next++;
    }
    return result;
  }

 private:
  static constexpr size_t kInputs = 19;
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> apply(
    const Tensor& pred, const Tensor& target, const OptionalTensor& weights, const Balance* state,
    const OptionalTensor& mask, const OptionalTensor& ids, const OptionalTensor& extra_negatives,
    const OptionalTensor& learned_temperature, at::IntArrayRef terms, at::IntArrayRef monitored, double temperature,
    bool both, int64_t negatives, bool positives_by_id, double margin, double variance_target, int64_t chunk_bytes) {
  int64_t needs = 0;
  if (at::GradMode::is_enabled() && !c10::InferenceMode::is_enabled()) {
    TORCH_CHECK(
        !needs_gradient(weights), "amn_kernels::seq_loss_fixed has no gradient for weights; use the reference backend");
    needs = (pred.requires_grad() ? kNeedsPred : 0) | (target.requires_grad() ? kNeedsTarget : 0) |
            (needs_gradient(extra_negatives) ? kNeedsExtra : 0) |
            (needs_gradient(learned_temperature) ? kNeedsTemperature : 0);
  }
  Results out;
  if (needs == 0) {
    out = run_forward(
        pred, target, weights, state, mask, ids, extra_negatives, learned_temperature, terms, monitored, temperature,
        both, negatives, positives_by_id, margin, variance_target, chunk_bytes, needs);
  } else {
    const variable_list differentiable = SeqLoss::apply(
        &out, pred, target, weights, state, mask, ids, extra_negatives, learned_temperature, terms, monitored,
        temperature, both, negatives, positives_by_id, margin, variance_target, chunk_bytes, needs);
    out.loss = differentiable[0];
    out.values = differentiable[1];
  }
  return {out.loss, out.values, out.gram, out.metrics, out.weights};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> seq_loss_fixed(
    const Tensor& pred, const Tensor& target, const Tensor& weights, const OptionalTensor& mask,
    const OptionalTensor& ids, const OptionalTensor& extra_negatives, const OptionalTensor& learned_temperature,
    at::IntArrayRef terms, at::IntArrayRef monitored, double temperature, bool both, int64_t negatives,
    bool positives_by_id, double margin, double variance_target, int64_t chunk_bytes) {
  auto [loss, values, gram, metrics, applied] = apply(
      pred, target, weights, nullptr, mask, ids, extra_negatives, learned_temperature, terms, monitored, temperature,
      both, negatives, positives_by_id, margin, variance_target, chunk_bytes);
  return {loss, values, gram, metrics};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> seq_loss_balanced(
    const Tensor& pred, const Tensor& target, const Tensor& mean, const Tensor& updates, const Tensor& calls,
    const Tensor& skipped, const Tensor& lambdas, const Tensor& most, int64_t anchor, double decay,
    int64_t update_every, bool by_value, bool update, const OptionalTensor& mask, const OptionalTensor& ids,
    const OptionalTensor& extra_negatives, const OptionalTensor& learned_temperature, at::IntArrayRef terms,
    at::IntArrayRef monitored, double temperature, bool both, int64_t negatives, bool positives_by_id, double margin,
    double variance_target, int64_t chunk_bytes) {
  const Balance state{mean, updates, calls, skipped, lambdas, most, {anchor, decay, update_every, by_value, update}};
  return apply(
      pred, target, std::nullopt, &state, mask, ids, extra_negatives, learned_temperature, terms, monitored,
      temperature, both, negatives, positives_by_id, margin, variance_target, chunk_bytes);
}

void register_for(torch::Library& m) {
  m.impl("_seq_loss_forward", seq_loss_forward);
  m.impl("_seq_loss_backward", seq_loss_backward);
  m.impl("_balance", balance);
}

TORCH_LIBRARY_IMPL(amn_kernels, CompositeImplicitAutograd, m) {
  m.impl("seq_loss_fixed", seq_loss_fixed);
  m.impl("seq_loss_balanced", seq_loss_balanced);
}

TORCH_LIBRARY_IMPL(amn_kernels, CPU, m) { register_for(m); }
#ifdef AMN_CUDA
TORCH_LIBRARY_IMPL(amn_kernels, CUDA, m) { register_for(m); }
#endif

}  // namespace
}  // namespace amn
