// Weights on the E8 lattice (docs/format.md, `e8p`): eight columns are 16 bits, the number of a point.
//
// Some rows at a time become bytes in the cache and go through the loops for 8-bit codes: a block of eight is one
// look-up of its magnitudes and a few operations on all of its bytes at once, less than what the products cost.
#pragma once
#include <cstddef>
#include <cstdint>

#include "weights/dense/weight.h"

namespace bitfold {

struct LatticeWeight {
  const uint8_t* codes = nullptr;       // n rows of ceil(k / 8) codes, low byte first
  const void* scale = nullptr;          // (n) bfloat16; 16 bytes behind it can be read
  const uint8_t* magnitudes = nullptr;  // (256, 8): four times the magnitudes, 2, 6 or 10
  size_t n = 0, k = 0;
};

// The same weight as rows of 8-bit codes, which are not there yet.
DenseWeight in_bytes(const LatticeWeight& w);

// Rows [begin, end) of `in_bytes` into out, which has room for 64 bytes more.
void unpack_rows(const LatticeWeight& w, size_t begin, size_t end, uint8_t* out);

// How many of the rows stay in the second-level cache while they are bytes.
size_t rows_at_a_time(const LatticeWeight& w);

}  // namespace bitfold
