// The schemas of all ops, written once. Shape rules and gradients are in Python, in omnimoe/ops/_library.py.
//
// Only the stable ABI of LibTorch is used, so one build serves PyTorch 2.11 and later.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(omnimoe, m) {
  // Rows in group order times the matrix of their group: x (R, D) and weight (G, F, D), or (G, D, F) where transposed.
  // With row_index, output row r is made of row row_index[r] of x.
  m.def(
      "grouped_mm(Tensor x, Tensor weight, Tensor offsets, Tensor? bias=None, Tensor? row_index=None, "
      "bool transposed=False) -> Tensor");
  // The gradient of a bank: grad (R, F) and x (R, D), or rows of either by index, to (G, F, D).
  m.def(
      "grouped_wgrad(Tensor grad, Tensor x, Tensor offsets, Tensor? grad_index=None, Tensor? x_index=None) -> Tensor");
  // The network of each group over rows x[token_index], summed by token with weights; and, if kept, pre-activations.
  m.def(
      "experts_mlp(Tensor x, Tensor w_in, Tensor w_out, Tensor offsets, Tensor? token_index, Tensor? weights, "
      "int activation, bool keep) -> (Tensor, Tensor)");
  m.def(
      "experts_mlp_backward(Tensor grad, Tensor x, Tensor z, Tensor w_in, Tensor w_out, Tensor offsets, "
      "Tensor? token_index, Tensor? weights, int activation) -> (Tensor, Tensor, Tensor, Tensor)");
}
