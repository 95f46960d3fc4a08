// The algorithm, device-agnostic: vendor matrix products plus the primitives of primitives.h.
//
//   forward   row_stats                      norms, distances, 1 - cos of every row
//             per chunk of rows, block of keys:
//               S = P K^T                    vendor GEMM
//               softmax_rows_(S)             in place
//               O = rescale O + S K          vendor GEMM, with gradients only
//             row_dots(O)                    o, and the scalars for norms and angles of the term gradients
//             term_sums                      values, Gram matrix, metrics
//   backward  row_combine                    grad = a p + b d + c o
//
// S exists one block at a time, within chunk_bytes, and no normalised copy does: norms are folded into softmax_rows_.
#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <string>
#include <tuple>

#include "primitives.h"

namespace amn {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Rows of a chunk. Measured at D = 768 on two cores, N = 2,048 to 8,192: chunks of 256 rows took 6-18% longer, as the keys
// are packed anew for every product; 2,048 gained nothing beyond noise.
constexpr int64_t kChunkRows = 1024;
constexpr int64_t kMinBlockKeys = 64;

const Primitives& primitives(const Tensor& x) {
  TORCH_CHECK(x.device().is_cpu(), "amn_kernels: no compiled primitives for device ", x.device());
  return cpu::primitives;
}

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

// x[begin : begin + count], without the cost of a view where that is all of x.
Tensor rows_of(const Tensor& x, int64_t begin, int64_t count) {
  return count == x.size(0) ? x : x.narrow(0, begin, count);
}

// The same for row scalars [kRowScalars, N].
Tensor scalars_of(const Tensor& rows, int64_t begin, int64_t count) {
  return count == rows.size(1) ? rows : rows.narrow(1, begin, count);
}

// The rows of a [..., D] tensor, read chunk by chunk in the dtype that is computed in.
class Rows {
 public:
  Rows(const Tensor& x, at::ScalarType real) : x_(x.dim() == 2 ? x : x.reshape({-1, x.size(-1)})), real_(real) {}

  int64_t size() const { return x_.size(0); }
  int64_t dim() const { return x_.size(1); }

  // True if chunks are views: nothing has to be widened or made contiguous along D.
  bool direct() const { return x_.scalar_type() == real_ && (x_.stride(1) == 1 || x_.size(1) == 1); }

  Tensor chunk(int64_t begin, int64_t count) const {  // [count, D] real
    const Tensor view = rows_of(x_, begin, count);
    if (direct()) return view;
    return view.to(real_).contiguous();
  }

 private:
  Tensor x_;  // [N, D]
  at::ScalarType real_;
};

template <class F>
void for_chunks(int64_t rows, int64_t step, const F& f) {
  for (int64_t begin = 0; begin < rows; begin += step) f(begin, std::min(step, rows - begin));
}

// Keys per block of similarities so that the scratch memory of a chunk stays within the budget.
int64_t block_keys(int64_t chunk_rows, int64_t keys, int64_t dim, bool widened, int64_t itemsize, int64_t budget) {
  const int64_t fixed = widened ? chunk_rows * dim : 0;
  const int64_t per_key = chunk_rows + (widened ? dim : 0);
  const int64_t fits = (budget / itemsize - fixed) / per_key;
  return std::clamp<int64_t>(fits, std::min(kMinBlockKeys, keys), keys);
}

// Fills kMax and kOthers of `rows`; returns o [N, D], or an empty tensor without gradients.
Tensor attend(
    const Primitives& prim, const Rows& pred, const Rows& target, const Tensor& rows, const Tensor& key_scale,
    double temperature, int64_t chunk_bytes, bool with_gradient) {
  const auto real = key_scale.options();
  const int64_t n = pred.size(), dim = pred.dim();
  const int64_t chunk_rows = std::min(kChunkRows, n);
  const int64_t keys = block_keys(chunk_rows, n, dim, !target.direct(), key_scale.itemsize(), chunk_bytes);

  const Tensor rescale = at::empty({keys < n ? chunk_rows : 0, 1}, real);  // one block has nothing to merge with
  const Tensor scratch = at::empty({chunk_rows, keys}, real);
  const Tensor attention = at::empty({with_gradient ? n : 0, dim}, real);
  prim.prepare(scratch);
  prim.prepare(attention);

  Tensor block = target.chunk(0, keys);
  for_chunks(n, chunk_rows, [&](int64_t begin, int64_t count) {
    const Tensor queries = pred.chunk(begin, count);
    const Tensor chunk_scalars = scalars_of(rows, begin, count);
    const Tensor chunk_rescale = keys < n ? rows_of(rescale, 0, count) : rescale;
    Tensor out = with_gradient ? rows_of(attention, begin, count) : attention;
    for (int64_t first = 0; first < n; first += keys) {
      const int64_t width = std::min(keys, n - first);
      if (keys < n) block = target.chunk(first, width);
      Tensor logits = rows_of(scratch, 0, count);
      if (width < keys) logits = logits.narrow(1, 0, width);
      at::mm_out(logits, queries, block.t());
      prim.softmax_rows_(
          logits, rows_of(key_scale, first, width), chunk_scalars, chunk_rescale, begin - first, temperature);
      if (!with_gradient) continue;
      if (first == 0) {
        at::mm_out(out, logits, block);
      } else {
        out.mul_(chunk_rescale);
        at::addmm_out(out, out, logits, block);
      }
    }
    if (with_gradient) prim.row_dots(queries, target.chunk(begin, count), out, chunk_scalars, temperature);
  });
  return attention;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> seq_loss_forward(
    const Tensor& pred, const Tensor& target, at::IntArrayRef term_ids, at::IntArrayRef monitored,
    double temperature, int64_t chunk_bytes, bool with_gradient) {
  const TermList terms = term_list(term_ids, monitored);
  const Primitives& prim = primitives(pred);
  const bool wide = pred.scalar_type() == at::kDouble || target.scalar_type() == at::kDouble;
  const auto real = pred.options().dtype(wide ? at::kDouble : at::kFloat);
  const int64_t dim = pred.size(-1);
  const Rows p(pred, wide ? at::kDouble : at::kFloat), t(target, wide ? at::kDouble : at::kFloat);
  const int64_t n = p.size();

  const Tensor rows = at::empty({kRowScalars, n}, pred.options().dtype(at::kDouble));
  const Tensor key_scale = at::empty({n}, real);
  for_chunks(n, p.direct() && t.direct() ? n : kChunkRows, [&](int64_t begin, int64_t count) {
    prim.row_stats(
        p.chunk(begin, count), t.chunk(begin, count), scalars_of(rows, begin, count), rows_of(key_scale, begin, count));
  });

  Tensor attention;
  if (const int64_t index = terms.find(kInfonce); index >= 0) {
    const bool attends = with_gradient && terms.differentiable[index];
    attention = attend(prim, p, t, rows, key_scale, temperature, chunk_bytes, attends);
  } else {
    attention = at::empty({0, dim}, real);
  }
  const Tensor values = at::empty({terms.size}, real);
  const Tensor gram = with_gradient ? at::empty({terms.size, terms.size}, real) : at::empty({0, 0}, real);
  const Tensor metrics = at::empty({kMetrics}, real);
  prim.term_sums(rows, terms, dim, temperature, values, gram, metrics);
  return {values, gram, metrics, rows, attention};
}

Tensor seq_loss_backward(
    const Tensor& grad_values, const Tensor& pred, const Tensor& target, const Tensor& rows, const Tensor& attention,
    at::IntArrayRef term_ids, at::IntArrayRef monitored, double temperature) {
  const TermList terms = term_list(term_ids, monitored);
  const Primitives& prim = primitives(pred);
  const at::ScalarType real = attention.scalar_type();
  const Rows p(pred, real), t(target, real);
  const Tensor grad = at::empty(pred.sizes(), pred.options().memory_format(at::MemoryFormat::Contiguous));
  prim.prepare(grad);
  const Tensor grad_rows = grad.view({p.size(), pred.size(-1)});
  const Tensor weights = grad_values.to(real).contiguous();
  const bool direct = p.direct() && t.direct() && grad.scalar_type() == real;
  for_chunks(p.size(), direct ? p.size() : kChunkRows, [&](int64_t begin, int64_t count) {
    const Tensor out = rows_of(grad_rows, begin, count);
    const Tensor result = out.scalar_type() == real ? out : at::empty(out.sizes(), attention.options());
    prim.row_combine(
        weights, p.chunk(begin, count), t.chunk(begin, count),
        attention.size(0) ? rows_of(attention, begin, count) : attention, scalars_of(rows, begin, count), terms,
        p.size(), temperature, result);
    if (!result.is_same(out)) out.copy_(result);
  });
  return grad;
}

Tensor balance(
    const Tensor& values, const Tensor& gram, const Tensor& mean, const Tensor& updates, const Tensor& calls,
    const Tensor& skipped, const Tensor& lambdas, const Tensor& most, int64_t anchor, double decay,
    int64_t update_every, bool by_value, bool update) {
  const Tensor weights = at::empty_like(values);
  const BalanceOptions options{anchor, decay, update_every, by_value, update};
  primitives(values).balance(values, gram, mean, updates, calls, skipped, lambdas, most, options, weights);
  return weights;
}

// The dispatcher's handles on the two halves, so that tracing sees them as ops.
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

class SeqLoss : public torch::autograd::Function<SeqLoss> {
 public:
  static variable_list forward(
      AutogradContext* ctx, const Tensor& pred, const Tensor& target, const Tensor& weights, at::IntArrayRef terms,
      at::IntArrayRef monitored, double temperature, int64_t chunk_bytes) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [values, gram, metrics, rows, attention] =
        forward_op().call(pred, target, terms, monitored, temperature, chunk_bytes, /*with_gradient=*/true);
    ctx->save_for_backward({pred, target, weights, rows, attention});
    ctx->saved_data["terms"] = terms;
    ctx->saved_data["monitored"] = monitored;
    ctx->saved_data["temperature"] = temperature;
    ctx->mark_non_differentiable({gram, metrics});
    ctx->set_materialize_grads(false);  // gram and metrics have no gradient; zeros for them would be made in vain
    return {at::dot(values, weights), values, gram, metrics};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list result(7);
    const auto saved = ctx->get_saved_variables();
    const Tensor& weights = saved[2];
    const auto grad = [&] {
      const Tensor grad_values = !grads[0].defined()   ? grads[1]
                                 : !grads[1].defined() ? grads[0] * weights
                                                       : grads[0] * weights + grads[1];
      return backward_op().call(
          grad_values, saved[0], saved[1], saved[3], saved[4], ctx->saved_data["terms"].toIntVector(),
          ctx->saved_data["monitored"].toIntVector(), ctx->saved_data["temperature"].toDouble());
    };
    if (!grads[0].defined() && !grads[1].defined()) return result;
    if (at::GradMode::is_enabled()) {
      result[0] = grad();  // create_graph: the op's own autograd formula, registered in Python, goes on from here
    } else {
      at::AutoDispatchBelowADInplaceOrView below;
      result[0] = grad();
    }
    return result;
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> seq_loss(
    const Tensor& pred, const Tensor& target, const Tensor& weights, at::IntArrayRef terms, at::IntArrayRef monitored,
    double temperature, int64_t chunk_bytes) {
  if (!at::GradMode::is_enabled() || !(pred.requires_grad() || target.requires_grad() || weights.requires_grad())) {
    auto [values, gram, metrics, rows, attention] =
        forward_op().call(pred, target, terms, monitored, temperature, chunk_bytes, /*with_gradient=*/false);
    return {at::dot(values, weights), values, gram, metrics};
  }
  TORCH_CHECK(
      !target.requires_grad() && !weights.requires_grad(),
      "amn_kernels::seq_loss has no gradient for target and weights; use the reference backend");
  const auto out = SeqLoss::apply(pred, target, weights, terms, monitored, temperature, chunk_bytes);
  return {out[0], out[1], out[2], out[3]};
}

TORCH_LIBRARY_IMPL(amn_kernels, CompositeImplicitAutograd, m) {
  m.impl("seq_loss", seq_loss);
  m.impl("_cpu_isa", [] { return std::string(cpu::isa()); });
}

TORCH_LIBRARY_IMPL(amn_kernels, CPU, m) {
  m.impl("_seq_loss_forward", seq_loss_forward);
  m.impl("_seq_loss_backward", seq_loss_backward);
  m.impl("_balance", balance);
}

}  // namespace
}  // namespace amn
