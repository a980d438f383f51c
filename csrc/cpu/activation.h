// Activations and their slopes on vectors: polynomials for float, the C library lane by lane for double.
#pragma once

#include "kernels.h"
#include "vector.h"

namespace omnimoe::cpu::OMNIMOE_ISA {

// Cephes' expf: 2^n times a polynomial over [-ln 2 / 2, ln 2 / 2]; relative error below 2e-7.
inline FloatVector exponential(FloatVector x) {
  x = x > 88.f ? broadcast(88.f) : x;
  x = x < -87.f ? broadcast(-87.f) : x;
  const FloatVector magic = broadcast(12582912.f);  // adding it rounds to an integer
  const FloatVector n = (x * 1.44269504f + magic) - magic;
  const FloatVector r = x - n * 0.693359375f + n * 2.12194440e-4f;
  FloatVector p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  const IntVector power = (__builtin_convertvector(n, IntVector) + 127) << 23;
  return p * same_bits<FloatVector>(power);
}
inline DoubleVector exponential(DoubleVector x) {
  for (int i = 0; i < Lanes<double>::count; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

// The error function; Abramowitz and Stegun 7.1.26 for float, absolute error below 2e-7. `bell` is exp(-x^2).
inline FloatVector error_function(FloatVector x, FloatVector bell) {
  const FloatVector size = x < 0.f ? -x : x;
  const FloatVector t = 1.f / (size * 0.3275911f + 1.f);
  FloatVector p = t * 1.061405429f - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const FloatVector y = 1.f - p * t * bell;
  return x < 0.f ? -y : y;
}
inline DoubleVector error_function(DoubleVector x, DoubleVector) {
  for (int i = 0; i < Lanes<double>::count; ++i) x[i] = __builtin_erf(x[i]);
  return x;
}

template <class A>
struct Activated {
  typename Lanes<A>::Vector value, slope;
};

// An activation and its derivative.
template <class A>
__attribute__((noinline)) Activated<A> activate(Activation kind, typename Lanes<A>::Vector x) {
  using V = typename Lanes<A>::Vector;
  const V zero = {};
  const A half = A(0.5);
  switch (kind) {
    case Activation::gelu: {
      const V bell = exponential(-half * x * x);
      const V share = half + half * error_function(x * A(0.70710678118654752440), bell);
      return {x * share, share + x * bell * A(0.39894228040143267794)};
    }
    case Activation::gelu_tanh: {
      const A scale = A(0.79788456080286535588), cubic = A(0.044715);
      const V inner = scale * (x + cubic * x * x * x);
      const V tanh = A(1) - A(2) / (exponential(A(2) * inner) + A(1));
      const V inner_slope = scale * (A(1) + A(3) * cubic * x * x);
      return {half * x * (A(1) + tanh), half * (A(1) + tanh) + half * x * (A(1) - tanh * tanh) * inner_slope};
    }
    case Activation::relu:
      return {x > zero ? x : zero, x > zero ? broadcast(A(1)) : zero};
    case Activation::relu2: {
      const V positive = x > zero ? x : zero;
      return {positive * positive, A(2) * positive};
    }
    default: {
      const V share = A(1) / (A(1) + exponential(-x));
      return {x * share, share * (A(1) + x * (A(1) - share))};
    }
  }
}

constexpr double kClamp = 7, kClampedSlope = 1.702;

// activation(gate) * up.
template <class A>
inline typename Lanes<A>::Vector gated(
    Activation kind, typename Lanes<A>::Vector gate, typename Lanes<A>::Vector up) {
  using V = typename Lanes<A>::Vector;
  if (kind != Activation::clamped_silu) return activate<A>(kind, gate).value * up;
  const V limit = broadcast(A(kClamp));
  gate = gate > limit ? limit : gate;
  up = up > limit ? limit : up < -limit ? -limit : up;
  return activate<A>(Activation::silu, gate * A(kClampedSlope)).value / A(kClampedSlope) * (up + A(1));
}

template <class A>
struct GatedSlopes {
  typename Lanes<A>::Vector value, gate, up;
};

// activation(gate) * up and its derivatives by both.
template <class A>
inline GatedSlopes<A> gated_slopes(
    Activation kind, typename Lanes<A>::Vector gate, typename Lanes<A>::Vector up) {
  using V = typename Lanes<A>::Vector;
  if (kind != Activation::clamped_silu) {
    const Activated<A> of_gate = activate<A>(kind, gate);
    return {of_gate.value * up, of_gate.slope * up, of_gate.value};
  }
  const V limit = broadcast(A(kClamp)), zero = {};
  const V held_gate = gate > limit ? limit : gate;
  const V held_up = (up > limit ? limit : up < -limit ? -limit : up) + A(1);
  const Activated<A> scaled = activate<A>(Activation::silu, held_gate * A(kClampedSlope));
  const V of_gate = scaled.value / A(kClampedSlope);
  return {of_gate * held_up, gate > limit ? zero : scaled.slope * held_up,
          up > limit ? zero : up < -limit ? zero : of_gate};
}

}  // namespace omnimoe::cpu::OMNIMOE_ISA
