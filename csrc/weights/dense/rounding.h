// Rounding to consecutive integers: the error of a scale, and columns one after the other with their errors fed
// forward.
//
// A weight w becomes the integer c nearest to w / scale + zero within [low, high], and decodes to (c - zero) * scale.
// The same bits come out on every instruction set and for any number of threads.
#pragma once
#include <cstddef>
#include <cstdint>

namespace bitfold {

struct Integers {
  float low = 0, high = 0;  // whole numbers
};

// Mean square error of each of `blocks` blocks of `length` weights under one scale and zero point (null: none) each.
void rounding_errors(const Integers& grid, const float* w, size_t blocks, size_t length, const float* scale,
                     const float* zero, float* error, int threads);

// Some neighbouring columns of W R on their way through error feedback (methods/gptq.py), each column contiguous.
struct Columns {
  size_t count = 0, rows = 0;    // columns, and the weights in each
  const float* lower = nullptr;  // (count, count), the lower triangle used: what the error of one leaves in a later one
  size_t stride = 0;             // between the rows of `lower`
  const float* target = nullptr;    // (count, rows)
  const float* carried = nullptr;   // (count, rows): what columns before these have left
  const int64_t* places = nullptr;  // (count): the number of each column in the weight
  const uint8_t* kept = nullptr;    // (count, rows): 0 where the aim is to be zero; or null
  float* decoded = nullptr;         // (count, rows)
  float* error = nullptr;           // (count, rows): target - decoded
};

// What the columns of a weight are rounded with.
struct ColumnScales {
  size_t group = 1;              // columns that share their scales
  const float* scale = nullptr;  // (groups, rows)
  const float* zero = nullptr;   // (groups, rows), or null
};

// codes: (columns of the weight, rows), c - low, written at the places.
void rounding_feedback(const Integers& grid, const ColumnScales& scales, const Columns& columns, uint8_t* codes,
                       int threads);

}  // namespace bitfold
