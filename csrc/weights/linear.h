// y = x W^T for W in few bits: who calls the loops (loops/), on which threads, in which memory.
#pragma once
#include "weights/dense/weight.h"
#include "weights/ggml/weight.h"
#include "weights/lattice/e8p.h"
#include "weights/trellis/weight.h"

namespace bitfold {

// y (m, n) = x (m, k) W^T, all row-major float32. With int8, x is rounded to 8 bits with one scale for each row
// (codes = round(x * 127 / absmax)); a row that holds NaN or infinity gives NaN.
void matmul(const DenseWeight& w, const float* x, size_t m, bool int8, float* y, int threads);
void matmul(const TrellisWeight& w, const float* x, size_t m, bool int8, float* y, int threads);
void matmul(const LatticeWeight& w, const float* x, size_t m, bool int8, float* y, int threads);
// A few rows of x are rounded to 15 bits, one scale for each (of 8 bits, that loses nothing more).
void matmul(const GgmlWeight& w, const float* x, size_t m, bool int8, float* y, int threads);

// Rows [begin, end) of the weight as float32 (end - begin, k).
void dequantize(const DenseWeight& w, size_t begin, size_t end, float* out, int threads);
void dequantize(const TrellisWeight& w, size_t begin, size_t end, float* out, int threads);
void dequantize(const LatticeWeight& w, size_t begin, size_t end, float* out, int threads);
void dequantize(const GgmlWeight& w, size_t begin, size_t end, float* out, int threads);

}  // namespace bitfold
