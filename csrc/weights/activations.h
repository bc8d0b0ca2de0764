// Rows of activations, in the arrangement that the loop wants: loops/gemv.h for one row, loops/gemm.h for more.
#pragma once
#include <cstddef>
#include <cstdint>

namespace bitfold {

// A number in three bytes, the products of which are added: 65536, 256 and 1 times the unit of a row.
constexpr size_t kPlanes = 3;

// In 8 bits.
struct Act8 {
  size_t m = 0, padded = 0;  // padded: columns, a multiple of kPad
  size_t planes = 1;         // so many rows after one another are parts of one: their products are added
  const int8_t* x = nullptr;
  const float* scale = nullptr;    // (m)
  const int32_t* start = nullptr;  // -offset * (sums of x), where accumulators start; gemv: by lane, gemm: by chunk
  const float* sums = nullptr;     // sums of x over each group, for zero points
};

struct ActF {
  size_t m = 0, padded = 0;
  static constexpr size_t planes = 1;
  const float* x = nullptr;
  const float* scale = nullptr;  // (m) of rounded activations, or null
  static constexpr const int32_t* start = nullptr;
  const float* sums = nullptr;
};

}  // namespace bitfold
