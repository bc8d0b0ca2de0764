// A weight as rows of codes of 1 to 8 bits (packing.h): its canonical layout, decoded in registers. There is no second
// copy of it in memory.
#pragma once
#include "weights/scaled.h"

namespace bitfold {

// What a code means; used by those of at most 4 bits.
struct Tables {
  bool has_lut = false;   // u = lut[code], else u = code
  uint8_t lut[16] = {};   // repeated periodically
  float points[16] = {};  // value of each code, repeated periodically
};

struct DenseWeight : Scaled, Tables {
  const uint8_t* codes = nullptr;  // n rows of row_bytes
  const uint8_t* tail = nullptr;   // a copy of rows [tail_from, n) with 64 readable bytes behind it
  size_t tail_from = 0, row_bytes = 0;

  // Loops read whole steps, which may end behind a row: of the last rows they read the copy.
  const uint8_t* row(size_t i) const {
    return i < tail_from ? codes + i * row_bytes : tail + (i - tail_from) * row_bytes;
  }
};

// How many of the last rows `tail` must hold.
inline size_t tail_rows(size_t n, size_t row_bytes) {
  const size_t rows = 1 + 64 / (row_bytes ? row_bytes : 1);
  return rows < n ? rows : n;
}

}  // namespace bitfold
