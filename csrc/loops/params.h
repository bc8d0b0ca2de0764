// Scales and zero points, bfloat16 or float32, and sums of activations that belong to them.
#pragma once
#include "codecs/dense.h"

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

// Sum over the groups of a row of scale * zero * sum(x): what zero points take away from every product.
template <class S>
inline float zero_part(const Weight& w, size_t row, const float* sums) {
  const size_t at = row * w.groups;
  size_t g = 0;
  typename S::F acc = S::zerof();
  for (; g + S::L <= w.groups; g += S::L) {
    const typename S::F sz = S::mul(params<S>(w.scale, at + g, w.bf16), params<S>(w.zero, at + g, w.bf16));
    acc = S::fma(sz, S::loadf(sums + g), acc);
  }
  float total = S::sum(acc);
  for (; g < w.groups; ++g) total += param(w.scale, at + g, w.bf16) * param(w.zero, at + g, w.bf16) * sums[g];
  return total;
}

// Scales of the step that begins at column `at`, one for each lane, where groups are shorter than steps.
template <class S>
inline typename S::F lane_scales(const Weight& w, size_t row, size_t at) {
  const size_t count = S::W / w.group;
  float s[4];
  for (size_t i = 0; i < count; ++i) s[i] = param(w.scale, row * w.groups + at / w.group + i, w.bf16);
  return S::expand(s, static_cast<int>(count));
}

// Several scales in one step, or one for a number of whole steps (or for the whole row).
template <class S>
inline bool scales_in_step(const Weight& w) {
  return w.group % S::W != 0;
}

// Steps that share a scale, and how many such runs there are in a row.
template <class S>
inline size_t run_length(const Weight& w, size_t steps) {
  return w.group == 0 ? steps : scales_in_step<S>(w) ? 1 : w.group / S::W;
}

template <class T>
inline void group_sums(const Weight& w, const T* x, float* sums) {
  const size_t group = w.group ? w.group : w.k;
  for (size_t g = 0; g < w.groups; ++g) {
    double sum = 0;
    for (size_t c = g * group; c < smaller(w.k, (g + 1) * group); ++c) sum += x[c];
    sums[g] = static_cast<float>(sum);
  }
}

}  // namespace BITFOLD_NS
}  // namespace bitfold
