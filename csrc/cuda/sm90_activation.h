// Activations of eight numbers at a time. Which one is asked once for all eight: silu, its tanh-like and its clamped
// kin are one formula with other numbers in it.
#pragma once

#include "activation.h"
#include "sm90_ptx.h"

namespace omnimoe::cuda::sm90 {

constexpr int kChunk = 8;  // columns that a thread stores at once

// Activations of the form x * sigmoid(linear * x + cubic * x^3), perhaps clamped.
struct SigmoidForm {
  float linear, cubic, limit, shift;

  __device__ explicit SigmoidForm(Activation kind) {
    const bool is_tanh = kind == Activation::gelu_tanh, is_clamped = kind == Activation::clamped_silu;
    linear = is_tanh ? 1.5957691216f : is_clamped ? 1.702f : 1.f;
    cubic = is_tanh ? 1.5957691216f * 0.044715f : 0.f;
    limit = is_clamped ? 7.f : 3.4e38f;
    shift = is_clamped ? 1.f : 0.f;
  }
  __device__ float held(float x) const { return x > limit ? limit : x; }
  __device__ float share(float x) const { return sigmoid(x * (linear + cubic * x * x)); }
  __device__ float slope(float x, float share) const {
    return share * (1.f + x * (1.f - share) * (linear + 3.f * cubic * x * x));
  }
};

__device__ inline float normal_share(float x) { return 0.5f + 0.5f * erff(x * 0.70710678f); }

// value[i] = activation(gate[i]) * up[i], or activation(gate[i]) without a gate.
template <bool kIsGated>
__device__ inline void activate_chunk(Activation kind, const float (&gate)[kChunk], const float (&up)[kChunk],
                                      float (&value)[kChunk]) {
  if (kind == Activation::relu || kind == Activation::relu2) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const float x = gate[i] < 0.f ? 0.f : gate[i];
      value[i] = (kind == Activation::relu2 ? x * x : x) * (kIsGated ? up[i] : 1.f);
    }
  } else if (kind == Activation::gelu) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) value[i] = gate[i] * normal_share(gate[i]) * (kIsGated ? up[i] : 1.f);
  } else {
    const SigmoidForm form(kind);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const float x = form.held(gate[i]);
      float other = 1.f;
      if (kIsGated) other = (up[i] < -form.limit ? -form.limit : form.held(up[i])) + form.shift;
      value[i] = x * form.share(x) * other;
    }
  }
}

// Besides the value, its derivatives by gate and up, in their places.
template <bool kIsGated>
__device__ inline void derive_chunk(Activation kind, float (&gate)[kChunk], float (&up)[kChunk],
                                    float (&value)[kChunk]) {
  const auto put = [&](int i, float of_gate, float slope, float other) {
    value[i] = of_gate * other;
    gate[i] = slope * other;
    up[i] = of_gate;
  };
  if (kind == Activation::relu || kind == Activation::relu2) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const float x = gate[i] < 0.f ? 0.f : gate[i];
      const bool is_square = kind == Activation::relu2;
      put(i, is_square ? x * x : x, is_square ? 2.f * x : gate[i] > 0.f ? 1.f : 0.f, kIsGated ? up[i] : 1.f);
    }
  } else if (kind == Activation::gelu) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const float x = gate[i], share = normal_share(x);
      put(i, x * share, share + x * expf(-0.5f * x * x) * 0.39894228f, kIsGated ? up[i] : 1.f);
    }
  } else {
    const SigmoidForm form(kind);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const float x = form.held(gate[i]), share = form.share(x);
      const bool is_held = gate[i] > form.limit, is_other_held = up[i] > form.limit || up[i] < -form.limit;
      float other = 1.f;
      if (kIsGated) other = (up[i] < -form.limit ? -form.limit : form.held(up[i])) + form.shift;
      put(i, x * share, is_held ? 0.f : form.slope(x, share), other);
      if (is_other_held) up[i] = 0.f;
    }
  }
}

}  // namespace omnimoe::cuda::sm90
