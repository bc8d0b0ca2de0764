// Scales and zero points, bfloat16 or float32, and sums of activations that belong to them.
#pragma once
#include "weights/dense/codec.h"

namespace bitfold {
namespace BITFOLD_NS {

inline size_t smaller(size_t a, size_t b) { return a < b ? a : b; }

inline float param(const void* p, size_t i, bool bf16) {
  if (!bf16) return static_cast<const float*>(p)[i];
  const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(p)[i]) << 16;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

template <class S>
inline typename S::F params(const void* p, size_t i, bool bf16) {
  return bf16 ? S::load_bf16(static_cast<const uint16_t*>(p) + i) : S::loadf(static_cast<const float*>(p) + i);
}

// total - (sum over the groups of a row of scale * zero * sum(x)): zero points take the same away from every product.
template <class S>
inline float less_zeros(const Scaled& w, size_t row, const float* sums, typename S::F total) {
  const size_t at = row * w.groups;
  size_t g = 0;
  for (; g + S::L <= w.groups; g += S::L) {
    const typename S::F sz = S::mul(params<S>(w.scale, at + g, w.bf16), params<S>(w.zero, at + g, w.bf16));
    total = S::fma(sz, S::mul(S::loadf(sums + g), S::set(-1)), total);
  }
  float rest = 0;
  for (; g < w.groups; ++g) rest += param(w.scale, at + g, w.bf16) * param(w.zero, at + g, w.bf16) * sums[g];
  return S::sum(total) - rest;
}

// Scales from the i-th on, spread over the lanes.
template <class S>
inline typename S::F spread(const Scaled& w, const typename S::Spread& how, size_t i) {
  return w.bf16 ? how.bf16(static_cast<const uint16_t*>(w.scale) + i) : how.f32(static_cast<const float*>(w.scale) + i);
}

// Scales in a step: 1, or more where groups are shorter than steps.
template <class S>
inline size_t scales_per_step(const Scaled& w) {
  return w.group % S::W ? S::W / w.group : 1;
}

// Steps that share a scale.
template <class S>
inline size_t run_length(const Scaled& w, size_t steps) {
  return w.group == 0 ? steps : w.group % S::W ? 1 : w.group / S::W;
}

// Of x (planes, padded): each plane in units of 256 of the next one.
template <class T>
inline void group_sums(const Scaled& w, const T* x, float* sums, size_t planes = 1, size_t padded = 0) {
  const size_t group = w.group ? w.group : w.k;
  for (size_t g = 0; g < w.groups; ++g) {
    double sum = 0;
    for (size_t p = 0; p < planes; ++p) {
      sum *= 256;
      for (size_t c = g * group; c < smaller(w.k, (g + 1) * group); ++c) sum += x[p * padded + c];
    }
    sums[g] = static_cast<float>(sum);
  }
}

}  // namespace BITFOLD_NS
}  // namespace bitfold
