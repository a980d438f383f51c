// Activations and their slopes, of one number at a time.
#pragma once

#include "ptx.h"

namespace omnimoe::cuda {

// activation(gate) * up, or activation(up) alone where there is no gate. clamped_silu is gpt-oss's:
// min(gate, limit) * sigmoid(1.702 * min(gate, limit)) * (clamp(up, -limit, limit) + 1), limit 7.
enum class Activation : int32_t { silu, gelu, gelu_tanh, relu, relu2, clamped_silu };

template <class A>
struct Activated {
  A value, slope;
};

template <class A>
__device__ inline Activated<A> activate(Activation kind, A x) {
  switch (kind) {
    case Activation::gelu: {
      const A share = A(0.5) + A(0.5) * erf(x * A(0.70710678118654752440));
      return {x * share, share + x * exp(A(-0.5) * x * x) * A(0.39894228040143267794)};
    }
    case Activation::gelu_tanh: {
      const A scale = A(0.79788456080286535588), cubic = A(0.044715);
      const A bent = tanh(scale * (x + cubic * x * x * x));
      const A inner_slope = scale * (A(1) + A(3) * cubic * x * x);
      return {A(0.5) * x * (A(1) + bent), A(0.5) * (A(1) + bent) + A(0.5) * x * (A(1) - bent * bent) * inner_slope};
    }
    case Activation::relu:
      return {x > A(0) ? x : A(0), x > A(0) ? A(1) : A(0)};
    case Activation::relu2: {
      const A positive = x > A(0) ? x : A(0);
      return {positive * positive, A(2) * positive};
    }
    default: {
      const A share = A(1) / (A(1) + exp(-x));
      return {x * share, share * (A(1) + x * (A(1) - share))};
    }
  }
}

template <class A>
struct GatedSlopes {
  A value, gate, up;
};

// activation(gate) * up and its derivatives by both.
template <class A>
__device__ inline GatedSlopes<A> gated(Activation kind, A gate, A up) {
  if (kind != Activation::clamped_silu) {
    const Activated<A> of_gate = activate(kind, gate);
    return {of_gate.value * up, of_gate.slope * up, of_gate.value};
  }
  const A limit = A(7), bend = A(1.702);
  const A held_gate = gate > limit ? limit : gate;
  const A held_up = (up > limit ? limit : up < -limit ? -limit : up) + A(1);
  const Activated<A> scaled = activate(Activation::silu, held_gate * bend);
  const A of_gate = scaled.value / bend;
  return {of_gate * held_up, gate > limit ? A(0) : scaled.slope * held_up,
          up > limit || up < -limit ? A(0) : of_gate};
}

}  // namespace omnimoe::cuda
