// y = x W^T for W in few bits: what the loops are given. See loops/ for the loops and linear.cpp for who calls them.
//
// The weight stays in its canonical layout (packing.h), row after row, and is decoded in registers: there is no second
// copy of it in memory. value(n, k) = (point[code(n, k)] - zero(n, k / group)) * scale(n, k / group).
//
// Columns are taken in steps of S::W codes (64, 32 or 16, by instruction set). Activations are padded with zeros to a
// multiple of kPad columns, so what lies behind the end of a row is multiplied by zero.
#pragma once
#include <cstddef>
#include <cstdint>

#include "weights/trellis/kernel.h"

namespace bitfold {

constexpr size_t kPad = 64;

struct Weight {
  const uint8_t* codes = nullptr;  // n rows of row_bytes
  const uint8_t* tail = nullptr;   // a copy of rows [tail_from, n) with 64 readable bytes behind it
  size_t tail_from = 0;
  size_t n = 0, k = 0, row_bytes = 0;
  int bits = 8;
  size_t group = 0;             // columns that share a scale, a multiple of 16; 0: the whole row
  size_t groups = 1;            // scales in a row; with a group below kPad, enough for the padded columns
  const void* scale = nullptr;  // (n, groups) bfloat16 or float32; 16 bytes behind it can be read
  const void* zero = nullptr;   // the same type and shape, or null: zero points, less the offset
  bool bf16 = false;            // type of scale and zero
  bool integers = true;         // point = (u - offset) * unit with u = lut[code] or code: int8 arithmetic is exact
  bool has_lut = false;         // u = lut[code] (at most 4 bits), else u = code
  int offset = 0;
  float unit = 1;
  uint8_t lut[16] = {};
  float points[16] = {};  // value of each code, repeated periodically; used if bits <= 4

  // Trellis tiles (docs/trellis.md) instead of rows of codes: row_bytes is the length of 32 rows, every row has one
  // bfloat16 scale, and the rest is as for bytes: bits = 8, offset = 128, unit = 1.
  const TrellisCode* trellis = nullptr;

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

// Rows of activations in 8 bits, in the arrangement that the loop wants: gemv.h for one row, gemm.h for more.
struct Act8 {
  size_t m = 0, padded = 0;  // padded: columns, a multiple of kPad
  const int8_t* x = nullptr;
  const float* scale = nullptr;    // (m)
  const int32_t* start = nullptr;  // -offset * (sums of x), where accumulators start; gemv: by lane, gemm: by chunk
  const float* sums = nullptr;     // sums of x over each group, for zero points
};

struct ActF {
  size_t m = 0, padded = 0;
  const float* x = nullptr;
  const float* scale = nullptr;  // (m) of rounded activations, or null
  static constexpr const int32_t* start = nullptr;
  const float* sums = nullptr;
};

// y (m, n) = x (m, k) W^T, all row-major float32. With int8, x is rounded to 8 bits with one scale for each row
// (codes = round(x * 127 / absmax)); a row that holds NaN or infinity gives NaN.
void matmul(const Weight& w, const float* x, size_t m, bool int8, float* y, int threads);

// x -> x R for R = diag(signs) H * scale, H = matrix (x) butterflies of `width`, repeated along the row; or the
// inverse.
struct Rotation {
  size_t size = 0;                // numbers in a row, a multiple of order * width
  size_t width = 1, order = 1;    // a power of two; a multiple of 4, or 1
  const float* matrix = nullptr;  // (order, order) of +1 and -1, or null if order = 1; for the inverse, transposed
  const float* signs = nullptr;   // (size)
  float scale = 1;
  bool inverse = false;
};

// x, out: (rows, size), which may be the same.
void rotate(const Rotation& r, const float* x, size_t rows, float* out, int threads);

// Dot products of four bytes that one thread makes to find out how many it can: returns their number.
size_t spin_dots(size_t rounds);

// Rows [begin, end) of the weight as float32 (end - begin, k).
void dequantize(const Weight& w, size_t begin, size_t end, float* out, int threads);

}  // namespace bitfold
