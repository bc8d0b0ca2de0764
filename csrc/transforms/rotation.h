// Hadamard rotations of activations.
#pragma once
#include <cstddef>

namespace bitfold {

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

}  // namespace bitfold
