// Rounding to integers, in plain loops over short arrays that the compiler makes vectors of. No sum depends on how wide
// those are.
#pragma once
#include "weights/dense/rounding.h"

namespace bitfold {
namespace BITFOLD_NS {

constexpr size_t kPart = 64;  // weights of a column that are taken at a time

// The nearest integer within the grid, ties to even: the sum with 1.5 * 2^23 has no room for a fraction. NaN: low.
inline float nearest_integer(float x, float low, float high) {
  constexpr float kMagic = 12582912.f;
  x = x > low ? x : low;
  x = x < high ? x : high;
  return (x + kMagic) - kMagic;
}

inline float inverse_of(float scale) { return scale == 0.f ? 0.f : 1.f / scale; }

static void grid_errors(const Integers& grid, const float* w, size_t blocks, size_t length, const float* scale,
                        const float* zero, float* error) {
  constexpr size_t kSums = 16;
  const float low = grid.low, high = grid.high;
  for (size_t b = 0; b < blocks; ++b, w += length) {
    const float step = scale[b], inverse = inverse_of(step), shift = zero ? zero[b] : 0.f;
    const auto squared = [=](float x) {
      const float d = (nearest_integer(x * inverse + shift, low, high) - shift) * step - x;
      return d * d;
    };
    float sums[kSums] = {};
    size_t i = 0;
    for (; i + kSums <= length; i += kSums)
      for (size_t j = 0; j < kSums; ++j) sums[j] += squared(w[i + j]);
    for (; i < length; ++i) sums[i % kSums] += squared(w[i]);
    for (size_t half = kSums / 2; half; half /= 2)
      for (size_t j = 0; j < half; ++j) sums[j] += sums[j + half];
    error[b] = sums[0] / static_cast<float>(length);
  }
}

// `width` weights (at most kPart) of every column, from `at` on. FULL: width is kPart.
template <bool FULL>
void feed_part(const Integers& grid, const ColumnScales& s, const Columns& c, uint8_t* out, size_t at, size_t width) {
  if (FULL) width = kPart;
  const float low = grid.low, high = grid.high;
  for (size_t j = 0; j < c.count; ++j) {
    const size_t own = j * c.rows + at, place = static_cast<size_t>(c.places[j]);
    const float* lower = c.lower + j * c.stride;
    float sum[kPart];
    for (size_t r = 0; r < width; ++r) sum[r] = c.carried[own + r];
    for (size_t i = 0; i < j; ++i) {
      const float* error = c.error + i * c.rows + at;
      const float factor = lower[i];
      for (size_t r = 0; r < width; ++r) sum[r] += factor * error[r];
    }
    const float pivot = 1.f / lower[j];
    const float* target = c.target + own;
    for (size_t r = 0; r < width; ++r) sum[r] = target[r] + pivot * sum[r];
    if (c.kept)
      for (size_t r = 0; r < width; ++r) sum[r] = c.kept[own + r] ? sum[r] : 0.f;
    const size_t block = place / s.group * c.rows + at;
    const float* scale = s.scale + block;
    float shift[kPart] = {};
    if (s.zero)
      for (size_t r = 0; r < width; ++r) shift[r] = s.zero[block + r];
    float* decoded = c.decoded + own;
    uint8_t* codes = out + place * c.rows + at;
    for (size_t r = 0; r < width; ++r) {
      const float integer = nearest_integer(sum[r] * inverse_of(scale[r]) + shift[r], low, high);
      codes[r] = static_cast<uint8_t>(static_cast<int32_t>(integer - low));
      sum[r] = (integer - shift[r]) * scale[r];
    }
    float* error = c.error + own;
    for (size_t r = 0; r < width; ++r) {
      decoded[r] = sum[r];
      error[r] = target[r] - sum[r];
    }
  }
}

// Weights [begin, end) of every column.
static void feed(const Integers& grid, const ColumnScales& s, const Columns& c, uint8_t* codes, size_t begin,
                 size_t end) {
  for (; begin + kPart <= end; begin += kPart) feed_part<true>(grid, s, c, codes, begin, kPart);
  if (begin < end) feed_part<false>(grid, s, c, codes, begin, end - begin);
}

}  // namespace BITFOLD_NS
}  // namespace bitfold
