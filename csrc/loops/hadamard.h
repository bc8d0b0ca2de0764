// Rotation of activations: H in O(k log k) additions, the same bits on every instruction set.
//
// A block is a matrix (order, width): each of its rows goes through the butterflies of a power of two, from neighbours
// outwards, then its columns through a dense matrix of +1 and -1, in the order of the rows.
#pragma once
#include "loops/params.h"

namespace bitfold {
namespace BITFOLD_NS {

// One row of `width` numbers (a power of two), in place.
template <class S>
void butterflies(float* x, size_t width) {
  size_t h = 1;
  if (width >= S::L) {
    for (size_t i = 0; i < width; i += S::L) S::storef(x + i, S::butterflies(S::loadf(x + i)));
    h = S::L;
  }
  for (; h < width; h *= 2)
    for (size_t i = 0; i < width; i += 2 * h) {
      size_t j = i;
      for (; j + S::L <= i + h; j += S::L) {
        const typename S::F a = S::loadf(x + j), b = S::loadf(x + j + h);
        S::storef(x + j, S::add(a, b));
        S::storef(x + j + h, S::sub(a, b));
      }
      for (; j < i + h; ++j) {
        const float a = x[j], b = x[j + h];
        x[j] = a + b;
        x[j + h] = a - b;
      }
    }
}

// out[j] = sum over i of x[i] * matrix[i, j] for rows of `width` numbers; order is a multiple of 4.
template <class S>
void mix(const float* matrix, size_t order, size_t width, const float* x, float* out) {
  for (size_t j = 0; j < order; j += 4) {
    size_t s = 0;
    for (; s + S::L <= width; s += S::L) {
      typename S::F acc[4] = {S::zerof(), S::zerof(), S::zerof(), S::zerof()};
      for (size_t i = 0; i < order; ++i) {
        const typename S::F v = S::loadf(x + i * width + s);
        for (size_t q = 0; q < 4; ++q) acc[q] = S::fma(v, S::set(matrix[i * order + j + q]), acc[q]);
      }
      for (size_t q = 0; q < 4; ++q) S::storef(out + (j + q) * width + s, acc[q]);
    }
    for (; s < width; ++s)
      for (size_t q = 0; q < 4; ++q) {
        float acc = 0;
        for (size_t i = 0; i < order; ++i) acc += x[i * width + s] * matrix[i * order + j + q];
        out[(j + q) * width + s] = acc;
      }
  }
}

// scratch: size floats.
template <class S>
void rotate_row(const Rotation& r, const float* x, float* out, float* scratch) {
  const size_t block = r.order * r.width;
  float* work = r.matrix ? scratch : out;
  for (size_t i = 0; i < r.size; ++i) work[i] = x[i] * (r.inverse ? r.scale : r.signs[i] * r.scale);
  for (size_t at = 0; at < r.size; at += r.width) butterflies<S>(work + at, r.width);
  for (size_t at = 0; r.matrix && at < r.size; at += block) mix<S>(r.matrix, r.order, r.width, work + at, out + at);
  for (size_t i = 0; r.inverse && i < r.size; ++i) out[i] *= r.signs[i];
}

}  // namespace BITFOLD_NS
}  // namespace bitfold
