// Weights on the E8 lattice (docs/format.md, `e8p`): eight columns are 16 bits, the number of a point.
//
// Some rows at a time become bytes in the cache and go through the loops for 8-bit codes: a block of eight is one
// look-up of its magnitudes and a few operations on all of its bytes at once, less than what the products cost.
#pragma once
#include <cstddef>
#include <cstdint>

namespace bitfold {

struct LatticeWeight {
  const uint8_t* codes = nullptr;       // n rows of ceil(k / 8) codes, low byte first
  const void* scale = nullptr;          // (n) bfloat16; 16 bytes behind it can be read
  const uint8_t* magnitudes = nullptr;  // (256, 8): four times the magnitudes, 2, 6 or 10
  size_t n = 0, k = 0;
};

// y (m, n) = x (m, k) W^T as `matmul` of linear.h.
void matmul(const LatticeWeight& w, const float* x, size_t m, bool int8, float* y, int threads);

// Rows [begin, end) as float32 (end - begin, k).
void dequantize(const LatticeWeight& w, size_t begin, size_t end, float* out, int threads);

}  // namespace bitfold
