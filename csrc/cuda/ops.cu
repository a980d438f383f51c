// The ops on CUDA tensors: checks of metadata, work memory, and the order of the kernels. Nothing waits for the device
// and no size depends on what tensors hold, so every op can be captured into a CUDA graph.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "host.h"
#if defined(OMNIMOE_SM90)
#include "sm90.h"
#endif

namespace omnimoe::cuda {

namespace {

Type type_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return Type::f32;
    case ScalarType::Double:
      return Type::f64;
    case ScalarType::BFloat16:
      return Type::bf16;
    case ScalarType::Half:
      return Type::f16;
    default:
      STD_TORCH_CHECK(false, "omnimoe's CUDA kernels take float32, float64, bfloat16 and float16");
  }
}

ScalarType wide_type_of(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

void check_like(const Tensor& x, const Tensor& like, const char* name, const Call& call) {
  STD_TORCH_CHECK(x.scalar_type() == like.scalar_type(), name, " must have the dtype of x");
  STD_TORCH_CHECK(call.has(x), name, " must be on the device of x");
}

// Columns side by side; other tensors are copied.
Tensor with_rows(const Tensor& x) {
  const int64_t last = x.dim() - 1;
  return x.stride(last) == 1 || x.size(last) <= 1 || !x.numel() ? x : torch::stable::contiguous(x);
}
// Columns or rows side by side.
Tensor with_lines(const Tensor& x) {
  const bool fits = x.stride(2) == 1 || x.size(2) <= 1 || x.stride(1) == 1;
  return fits || !x.numel() ? x : torch::stable::contiguous(x);
}

Groups groups_of(const Tensor& offsets, int64_t groups, int64_t rows, const Call& call) {
  STD_TORCH_CHECK(call.has(offsets) && offsets.scalar_type() == ScalarType::Int && offsets.dim() == 1 &&
                      offsets.size(0) == groups && offsets.is_contiguous(),
                  "offsets must be (", groups, ",) int32 on the device of x, one end a group");
  STD_TORCH_CHECK(rows < (int64_t{1} << 31), "more than 2^31 rows");
  return {static_cast<const int32_t*>(read(offsets)), groups, rows};
}

const int64_t* index_of(const std::optional<Tensor>& index, const Call& call) {
  if (!index) return nullptr;
  STD_TORCH_CHECK(call.has(*index) && index->scalar_type() == ScalarType::Long && index->dim() == 1 &&
                      index->is_contiguous(),
                  "an index must be (R,) int64 on the device of x, contiguous");
  return static_cast<const int64_t*>(read(*index));
}

int64_t rows_of(const Tensor& x, const std::optional<Tensor>& index) { return index ? index->size(0) : x.size(0); }

Rows as_rows(const Tensor& x, const int64_t* index = nullptr) { return {read(x), x.stride(0), index, x.size(0)}; }

Bank as_bank(const Tensor& w) {
  const bool is_flipped = w.stride(2) != 1 && w.size(2) > 1;
  return {read(w), w.stride(0), w.stride(is_flipped ? 2 : 1), is_flipped};
}
Bank transposed(Bank bank) {
  bank.is_flipped = !bank.is_flipped;
  return bank;
}

// The kernels for Hopper where they serve the call, else those for every device.
template <class P>
bool takes_hopper(const P& p, const Call& call) {
#if defined(OMNIMOE_SM90)
  return call.is_hopper() && !sm90::why_not(p);
#else
  return (void)p, (void)call, false;
#endif
}
template <class P>
void go(const P& p, const Call& call) {
#if defined(OMNIMOE_SM90)
  if (takes_hopper(p, call)) return sm90::run(p, call.queue());
#endif
  run(p, call.queue());
}

Tensor gather(const Tensor& x_, const Tensor& index, const std::optional<Tensor>& filled, const Call& call) {
  const Tensor x = torch::stable::contiguous(x_);
  int64_t sizes[8] = {index.size(0)}, per_row = 1;
  STD_TORCH_CHECK(x.dim() >= 1 && x.dim() <= 8, "x must have 1 to 8 dimensions");
  for (int64_t i = 1; i < x.dim(); ++i) per_row *= sizes[i] = x.size(i);
  Tensor out = torch::stable::new_empty(x, {sizes, size_t(x.dim())});
  if (!out.numel()) return out;
  run(Gather{read(x), index_of(index, call), filled ? static_cast<const bool*>(read(*filled)) : nullptr, x.size(0),
             index.size(0), per_row * int64_t(x.element_size()), written(out)},
      call.queue());
  return out;
}

// Rows by index: gathered first for the kernels that cannot, if those serve the call otherwise. `kept` keeps the copy.
template <class P>
void go_gathered(P& p, Rows P::*operand, const Tensor& x, const std::optional<Tensor>& index,
                 std::optional<Tensor>& kept, const Call& call) {
  if (!index) return;
  if (!kept && call.is_hopper() && !takes_hopper(p, call)) {
    P trial = p;
    Tensor made = fresh(x, {index->size(0), x.size(1)});
    trial.*operand = as_rows(made);
    if (takes_hopper(trial, call)) {
      kept = gather(x, *index, std::nullopt, call);
      trial.*operand = as_rows(*kept);
    }
  }
  if (kept) p.*operand = as_rows(*kept);
}

Tensor grouped_mm(const Tensor& x_, const Tensor& weight_, const Tensor& offsets, const std::optional<Tensor>& bias_,
                  const std::optional<Tensor>& row_index, bool is_transposed) {
  STD_TORCH_CHECK(x_.dim() == 2 && weight_.dim() == 3, "x must be (R, D) and weight (G, F, D)");
  const Call call(x_);
  const Tensor x = with_rows(x_), weight = with_lines(weight_);
  const int64_t depth = weight.size(is_transposed ? 1 : 2), columns = weight.size(is_transposed ? 2 : 1);
  STD_TORCH_CHECK(x.size(1) == depth, "x has ", x.size(1), " columns, the matrices are of ", depth);
  check_like(weight, x, "weight", call);
  const int64_t rows = rows_of(x, row_index);
  const Groups groups = groups_of(offsets, weight.size(0), rows, call);
  std::optional<Tensor> bias;
  if (bias_) {
    bias = torch::stable::contiguous(*bias_);
    check_like(*bias, x, "bias", call);
    STD_TORCH_CHECK(bias->dim() == 2 && bias->size(0) == weight.size(0) && bias->size(1) == columns, "bias must be (",
                    weight.size(0), ", ", columns, ")");
  }
  const int64_t* index = index_of(row_index, call);
  if (!depth || !columns || !rows) return zeros(x, {rows, columns});
  Tensor out = fresh(x, {rows, columns});
  const Bank bank = as_bank(weight);
  Product product{type_of(x), groups, depth, columns, as_rows(x, index), is_transposed ? transposed(bank) : bank,
                  bias ? read(*bias) : nullptr, nullptr, written(out)};
  std::optional<Tensor> gathered;
  go_gathered(product, &Product::x, x, row_index, gathered, call);
  go(product, call);
  return out;
}

Tensor grouped_wgrad(const Tensor& grad_, const Tensor& x_, const Tensor& offsets,
                     const std::optional<Tensor>& grad_index, const std::optional<Tensor>& x_index) {
  STD_TORCH_CHECK(grad_.dim() == 2 && x_.dim() == 2, "grad must be (R, F) and x (R, D)");
  const Call call(x_);
  const Tensor grad = with_rows(grad_), x = with_rows(x_);
  check_like(grad, x, "grad", call);
  const int64_t rows = rows_of(x, x_index);
  STD_TORCH_CHECK(rows_of(grad, grad_index) == rows, "grad and x must have as many rows");
  const Groups groups = groups_of(offsets, offsets.size(0), rows, call);
  const int64_t *of_grad = index_of(grad_index, call), *of_x = index_of(x_index, call);
  if (!groups.count || !grad.size(1) || !x.size(1) || !rows) return zeros(x, {groups.count, grad.size(1), x.size(1)});
  Tensor out = fresh(x, {groups.count, grad.size(1), x.size(1)});
  Wgrad wgrad{type_of(x), groups, grad.size(1), x.size(1), as_rows(grad, of_grad), as_rows(x, of_x), written(out)};
  std::optional<Tensor> gathered_grad, gathered_x;
  go_gathered(wgrad, &Wgrad::dy, grad, grad_index, gathered_grad, call);
  go_gathered(wgrad, &Wgrad::x, x, x_index, gathered_x, call);
  go(wgrad, call);
  return out;
}

struct Planned {
  Tensor ends, order, inverse;
};
Planned plan(const Tensor& ids, int64_t groups, const Call& call) {
  const int64_t rows = ids.size(0);
  const auto narrow = std::make_optional(ScalarType::Int);
  if (!rows || !groups) {
    Planned empty{zeros(ids, {groups}, narrow), fresh(ids, {rows}), fresh(ids, {rows})};
    STD_TORCH_CHECK(!rows, "rows without groups");
    return empty;
  }
  Planned made{fresh(ids, {groups}, narrow), fresh(ids, {rows}), fresh(ids, {rows})};
  Tensor work = fresh(ids, {plan_work(rows, groups) / 4}, narrow);
  run(Plan{static_cast<const int64_t*>(read(ids)), rows, groups, static_cast<int32_t*>(written(made.ends)),
           static_cast<int64_t*>(written(made.order)), static_cast<int64_t*>(written(made.inverse)), written(work)},
      call.queue());
  return made;
}

std::tuple<Tensor, Tensor, Tensor> route_plan(const Tensor& ids_, int64_t groups) {
  STD_TORCH_CHECK(ids_.dim() == 1 && ids_.scalar_type() == ScalarType::Long,
                  "expert_ids must be (R,) int64");
  STD_TORCH_CHECK(groups >= 0 && groups < (int64_t{1} << 31) - 1, "num_groups must be from 0 to 2^31 - 2");
  STD_TORCH_CHECK(ids_.size(0) < (int64_t{1} << 31), "more than 2^31 rows");
  const Call call(ids_);
  Planned made = plan(torch::stable::contiguous(ids_), groups, call);
  return {made.ends, made.order, made.inverse};
}

Tensor gather_rows(const Tensor& x, const Tensor& index, const std::optional<Tensor>& filled) {
  const Call call(x);
  STD_TORCH_CHECK(x.dim() >= 1, "x must be (R, ...)");
  STD_TORCH_CHECK(call.has(index) && index.dim() == 1 && index.scalar_type() == ScalarType::Long,
                  "index must be (S,) int64 on the device of x");
  const Tensor by = torch::stable::contiguous(index);
  std::optional<Tensor> mask;
  if (filled) {
    STD_TORCH_CHECK(call.has(*filled) && filled->dim() == 1 && filled->size(0) == index.size(0) &&
                        filled->scalar_type() == ScalarType::Bool,
                    "filled must be (", index.size(0), ",) bool");
    mask = torch::stable::contiguous(*filled);
  }
  return gather(x, by, mask, call);
}

Tensor sum_by(const Tensor& y, const Tensor& ends, const Tensor& order, const std::optional<Tensor>& weights,
              const Call& call) {
  Tensor out = fresh(y, {ends.size(0), y.size(1)});
  if (!out.numel()) return out;
  run(SumRows{type_of(y), static_cast<const int32_t*>(read(ends)), ends.size(0), y.size(1), y.size(0), read(y),
              static_cast<const int64_t*>(read(order)), weights ? read(*weights) : nullptr, written(out)},
      call.queue());
  return out;
}

std::optional<Tensor> checked_weights(const std::optional<Tensor>& weights, const Tensor& x, int64_t rows,
                                      const Call& call) {
  if (!weights) return std::nullopt;
  STD_TORCH_CHECK(call.has(*weights) && weights->dim() == 1 && weights->size(0) == rows &&
                      weights->scalar_type() == wide_type_of(x),
                  "weights must be (", rows, ",) float32, or float64 where x is, on the device of x");
  return torch::stable::contiguous(*weights);
}

Tensor sum_rows(const Tensor& y_, const Tensor& offsets, const Tensor& order, const std::optional<Tensor>& weights) {
  STD_TORCH_CHECK(y_.dim() == 2, "y must be (R, D)");
  const Call call(y_);
  const Tensor y = torch::stable::contiguous(y_);
  groups_of(offsets, offsets.size(0), y.size(0), call);
  index_of(order, call);
  STD_TORCH_CHECK(order.size(0) == y.size(0), "order must be (", y.size(0), ",)");
  return sum_by(y, offsets, order, checked_weights(weights, y, y.size(0), call), call);
}

// The operands of the experts' network; copies of what the kernels cannot read are kept here.
struct Experts {
  Tensor x, w_in, w_out;
  std::optional<Tensor> weights, b_in, b_out;
  const int64_t* token_index;
  Groups groups;
  int64_t rows, hidden, width;
  Activation activation;
  bool is_gated, is_interleaved;

  const void* weights_data() const { return weights ? read(*weights) : nullptr; }
};

Experts experts_of(const Tensor& x, const Tensor& w_in, const Tensor& w_out, const Tensor& offsets,
                   const std::optional<Tensor>& token_index, const std::optional<Tensor>& weights,
                   const std::optional<Tensor>& b_in, const std::optional<Tensor>& b_out, int64_t activation,
                   bool is_interleaved, const Call& call) {
  STD_TORCH_CHECK(x.dim() == 2 && w_in.dim() == 3 && w_out.dim() == 3,
                  "x must be (T, D), w_in (G, 2F, D) or (G, F, D), w_out (G, D, F)");
  Experts e{with_rows(x), with_lines(w_in), with_lines(w_out), {}, {}, {}, index_of(token_index, call), {},
            rows_of(x, token_index), x.size(1), w_out.size(2), Activation(activation), false, is_interleaved};
  check_like(e.w_in, e.x, "w_in", call);
  check_like(e.w_out, e.x, "w_out", call);
  const int64_t wide = w_in.size(1);
  STD_TORCH_CHECK(w_in.size(2) == e.hidden && w_out.size(1) == e.hidden && w_in.size(0) == w_out.size(0) &&
                      (wide == e.width || wide == 2 * e.width),
                  "w_in must be (G, 2F, D) or (G, F, D) and w_out (G, D, F), with D = ", e.hidden);
  e.is_gated = wide == 2 * e.width;
  STD_TORCH_CHECK(activation >= 0 && activation <= int64_t(Activation::clamped_silu), "unknown activation ",
                  activation);
  STD_TORCH_CHECK(e.is_gated || e.activation != Activation::clamped_silu, "clamped_silu needs a gate");
  e.weights = checked_weights(weights, x, e.rows, call);
  e.groups = groups_of(offsets, w_in.size(0), e.rows, call);
  using Bias = std::optional<Tensor>;
  const auto bias = [&](const Bias& given, int64_t columns, const char* name) -> Bias {
    if (!given) return std::nullopt;
    check_like(*given, x, name, call);
    STD_TORCH_CHECK(given->dim() == 2 && given->size(0) == w_in.size(0) && given->size(1) == columns, name,
                    " must be (", w_in.size(0), ", ", columns, ")");
    return torch::stable::contiguous(*given);
  };
  e.b_in = bias(b_in, wide, "b_in");
  e.b_out = bias(b_out, e.hidden, "b_out");
  return e;
}

std::tuple<Tensor, Tensor> experts_mlp(const Tensor& x, const Tensor& w_in, const Tensor& w_out, const Tensor& offsets,
                                       const std::optional<Tensor>& token_index, const std::optional<Tensor>& weights,
                                       const std::optional<Tensor>& b_in, const std::optional<Tensor>& b_out,
                                       int64_t activation, bool is_interleaved, bool keep) {
  const Call call(x);
  const Experts e =
      experts_of(x, w_in, w_out, offsets, token_index, weights, b_in, b_out, activation, is_interleaved, call);
  const int64_t wide = w_in.size(1);
  if (!e.rows || !e.hidden || !e.width) return {zeros(x, {x.size(0), e.hidden}), zeros(x, {keep ? e.rows : 0, wide})};
  Tensor z = fresh(x, {keep ? e.rows : 0, wide}), h = fresh(x, {e.rows, e.width}), y = fresh(x, {e.rows, e.hidden});
  Hidden first{type_of(x), e.groups, e.hidden, e.width, e.activation, e.is_gated, e.is_interleaved,
               as_rows(e.x, e.token_index), as_bank(e.w_in), e.b_in ? read(*e.b_in) : nullptr,
               keep ? written(z) : nullptr, written(h)};
  std::optional<Tensor> gathered;
  go_gathered(first, &Hidden::x, e.x, token_index, gathered, call);
  go(first, call);
  const bool scales = !token_index && e.weights;
  go(Product{type_of(x), e.groups, e.width, e.hidden, as_rows(h), as_bank(e.w_out), e.b_out ? read(*e.b_out) : nullptr,
             scales ? e.weights_data() : nullptr, written(y)},
     call);
  if (!token_index) return {y, z};
  const Planned by_token = plan(*token_index, x.size(0), call);
  return {sum_by(y, by_token.ends, by_token.order, e.weights, call), z};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> experts_mlp_backward(
    const Tensor& grad_, const Tensor& x, const Tensor& z_, const Tensor& w_in, const Tensor& w_out,
    const Tensor& offsets, const std::optional<Tensor>& token_index, const std::optional<Tensor>& weights,
    const std::optional<Tensor>& b_in, const std::optional<Tensor>& b_out, int64_t activation, bool is_interleaved) {
  const Call call(x);
  const Experts e =
      experts_of(x, w_in, w_out, offsets, token_index, weights, b_in, b_out, activation, is_interleaved, call);
  const Tensor grad = with_rows(grad_), z = torch::stable::contiguous(z_);
  const int64_t count = w_in.size(0), wide = w_in.size(1), tokens = x.size(0);
  check_like(grad, x, "grad", call);
  check_like(z, x, "z", call);
  STD_TORCH_CHECK(grad.dim() == 2 && grad.size(0) == tokens && grad.size(1) == e.hidden,
                  "grad must have the shape of x");
  STD_TORCH_CHECK(z.dim() == 2 && z.size(0) == e.rows && z.size(1) == wide,
                  "z must be the pre-activations that experts_mlp kept");
  const auto wide_type = std::make_optional(wide_type_of(x));
  const auto none = [&] { return zeros(x, {0}); };
  if (!e.rows || !e.hidden || !e.width || !count)
    return {zeros(x, {tokens, e.hidden}), zeros(x, {count, wide, e.hidden}), zeros(x, {count, e.hidden, e.width}),
            zeros(x, {weights ? e.rows : 0}, wide_type), b_in ? zeros(x, {count, wide}) : none(),
            b_out ? zeros(x, {count, e.hidden}) : none()};

  // through the second product and the activation
  Tensor grad_z = fresh(x, {e.rows, wide}), h = fresh(x, {e.rows, e.width});
  Tensor shares = fresh(x, {weights ? e.rows : 0, shares_of(e.width)}, wide_type);
  const Type type = type_of(x);
  const Rows grads = as_rows(grad, e.token_index);
  HiddenBackward second{type, e.groups, e.hidden, e.width, e.activation, e.is_gated, e.is_interleaved, grads,
                        as_bank(e.w_out), read(z), e.weights_data(), written(grad_z), written(h),
                        weights ? written(shares) : nullptr};
  std::optional<Tensor> gathered_grad, gathered_x;
  go_gathered(second, &HiddenBackward::grad, grad, token_index, gathered_grad, call);
  go(second, call);

  Tensor grad_weights = fresh(x, {weights ? e.rows : 0}, wide_type);
  if (weights)
    run(WeightsGrad{type, e.groups, e.hidden, shares_of(e.width), read(shares), grads,
                    e.b_out ? read(*e.b_out) : nullptr, written(grad_weights)},
        call.queue());

  // through the first product
  Tensor grad_rows = fresh(x, {e.rows, e.hidden});
  go(Product{type, e.groups, wide, e.hidden, as_rows(grad_z), transposed(as_bank(e.w_in)), nullptr, nullptr,
             written(grad_rows)},
     call);
  Tensor grad_x = grad_rows;
  if (token_index) {
    const Planned by_token = plan(*token_index, tokens, call);
    grad_x = sum_by(grad_rows, by_token.ends, by_token.order, std::nullopt, call);
  }

  // the banks
  Tensor grad_in = fresh(x, {count, wide, e.hidden}), grad_out = fresh(x, {count, e.hidden, e.width});
  Wgrad into{type, e.groups, wide, e.hidden, as_rows(grad_z), as_rows(e.x, e.token_index), written(grad_in)};
  go_gathered(into, &Wgrad::x, e.x, token_index, gathered_x, call);
  go(into, call);
  Wgrad out_of{type, e.groups, e.hidden, e.width, grads, as_rows(h), written(grad_out)};
  go_gathered(out_of, &Wgrad::dy, grad, token_index, gathered_grad, call);
  go(out_of, call);
  Tensor grad_b_in = b_in ? fresh(x, {count, wide}) : none(), grad_b_out = b_out ? fresh(x, {count, e.hidden}) : none();
  if (b_in) run(GroupSums{type, e.groups, wide, as_rows(grad_z), nullptr, written(grad_b_in)}, call.queue());
  if (b_out) run(GroupSums{type, e.groups, e.hidden, grads, e.weights_data(), written(grad_b_out)}, call.queue());
  return {grad_x, grad_in, grad_out, grad_weights, grad_b_in, grad_b_out};
}

}  // namespace

}  // namespace omnimoe::cuda

#define OMNIMOE_IMPL(library, key, m) STABLE_TORCH_LIBRARY_IMPL(library, key, m)
OMNIMOE_IMPL(OMNIMOE_LIBRARY, OMNIMOE_DISPATCH_KEY, m) {
  m.impl("grouped_mm", TORCH_BOX(&omnimoe::cuda::grouped_mm));
  m.impl("grouped_wgrad", TORCH_BOX(&omnimoe::cuda::grouped_wgrad));
  m.impl("route_plan", TORCH_BOX(&omnimoe::cuda::route_plan));
  m.impl("gather_rows", TORCH_BOX(&omnimoe::cuda::gather_rows));
  m.impl("sum_rows", TORCH_BOX(&omnimoe::cuda::sum_rows));
  m.impl("experts_mlp", TORCH_BOX(&omnimoe::cuda::experts_mlp));
  m.impl("experts_mlp_backward", TORCH_BOX(&omnimoe::cuda::experts_mlp_backward));
}

// Read by Python through ctypes.
extern "C" __attribute__((visibility("default"))) const char* omnimoe_cuda_kernels() {
#if defined(OMNIMOE_SM90)
  return "sm_80 sm_90a";
#else
  return "sm_80";
#endif
}
