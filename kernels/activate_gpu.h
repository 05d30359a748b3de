// activate_gpu.h: an MLP's activations on a GPU, for the kernels that end with one.
#pragma once

#include "kernels/gpu.h"
#include "kernels/matmul.h"

__device__ inline float silu(float x) {
  return x / (1 + expf(-x));
}

__device__ inline float act(Activation activation, float x) {
  switch (activation) {
    case Activation::gelu:
      return 0.5f * x * (1 + erff(x * 0.70710678f));
    case Activation::gelu_tanh:  // arXiv 1606.08415, section 2
      return 0.5f * x * (1 + tanhf(0.7978845608f * fmaf(0.044715f, x * x * x, x)));
    default:
      return silu(x);
  }
}

// gpt-oss's
__device__ inline float swiglu_oai(float gate, float up, float limit) {
  constexpr float STEEPNESS = 1.702f;
  const float g = gate > limit ? limit : gate;  // fminf would pass over a NaN
  const float u = up > limit ? limit : up < -limit ? -limit : up;
  return (u + 1) * (silu(g * STEEPNESS) * (1 / STEEPNESS));
}

// act(gate) * up; gate null: act(up)
__device__ inline float activated(Activation activation, float limit, const float* gate, float up) {
  if (activation == Activation::swiglu_oai) return swiglu_oai(*gate, up, limit);
  return gate ? act(activation, *gate) * up : act(activation, up);
}
