#include "weights/linear.h"

#include <algorithm>
#include <cstring>

#include "system/dispatch.h"
#include "system/scratch.h"
#include "system/threads.h"
#include "weights/dense/packing.h"
#include "weights/prepared.h"

namespace bitfold {
namespace {

constexpr size_t kMostRows = 256;  // rows of activations that one panel serves before the next is decoded

thread_local Scratch codes_memory, prepared_memory;

// Rows that a thread decodes at least.
size_t decode_grain(size_t k) { return 32 + (1 << 16) / (k + 1); }

// Rows of activations that a thread makes ready at least.
size_t prepare_grain(size_t k) { return 1 + (1 << 14) / (k + 1); }

template <class W>
void matmul_with(const W& w, const float* x, size_t m, bool int8, float* y, int threads) {
  if (w.k == 0) {
    std::memset(y, 0, m * w.n * sizeof(float));
    return;
  }
  if (w.n == 0) return;
  for (size_t at = 0; at < m; at += kMostRows) {
    const size_t rows = std::min(m - at, kMostRows);
    const Prepared<W> prepared(w, rows, int8, prepared_memory.get<char>(Prepared<W>::bytes(w, rows, int8)));
    parallel_for(rows, prepare_grain(w.k), threads, [&](size_t begin, size_t end) {
      for (size_t i = begin; i < end; ++i) prepared.row(i, x + (at + i) * w.k);
    });
    parallel_for(w.n, kRowGrain, threads, [&](size_t begin, size_t end) { prepared.times(begin, end, y + at * w.n); });
  }
}

}  // namespace

void matmul(const DenseWeight& w, const float* x, size_t m, bool int8, float* y, int threads) {
  matmul_with(w, x, m, int8, y, threads);
}

void matmul(const TrellisWeight& w, const float* x, size_t m, bool int8, float* y, int threads) {
  matmul_with(w, x, m, int8, y, threads);
}

void matmul(const LatticeWeight& w, const float* x, size_t m, bool int8, float* y, int threads) {
  matmul_with(w, x, m, int8, y, threads);
}

void matmul(const GgmlWeight& w, const float* x, size_t m, bool int8, float* y, int threads) {
  matmul_with(w, x, m, int8, y, threads);
}

void dequantize(const DenseWeight& w, size_t begin, size_t end, float* out, int threads) {
  const Table& t = table();
  parallel_for(end - begin, decode_grain(w.k), threads, [&](size_t from, size_t to) {
    uint8_t* codes = codes_memory.get<uint8_t>(w.k);
    for (size_t r = from; r < to; ++r) {
      unpack_row(w.codes + (begin + r) * w.row_bytes, w.k, w.bits, codes);
      t.decode(w, begin + r, codes, out + r * w.k);
    }
  });
}

void dequantize(const TrellisWeight& w, size_t begin, size_t end, float* out, int threads) {
  const Table& t = table();
  parallel_for(end - begin, decode_grain(w.k), threads,
               [&](size_t from, size_t to) { t.decode_tiles(w, begin + from, begin + to, out + from * w.k); });
}

void dequantize(const LatticeWeight& w, size_t begin, size_t end, float* out, int threads) {
  const Table& t = table();
  const DenseWeight rows = in_bytes(w);
  parallel_for(end - begin, decode_grain(w.k), threads, [&](size_t from, size_t to) {
    uint8_t* codes = codes_memory.get<uint8_t>(w.k + 64);
    for (size_t r = from; r < to; ++r) {
      unpack_rows(w, begin + r, begin + r + 1, codes);
      t.decode(rows, begin + r, codes, out + r * w.k);
    }
  });
}

void dequantize(const GgmlWeight& w, size_t begin, size_t end, float* out, int threads) {
  const Table& t = table();
  parallel_for(end - begin, decode_grain(w.k), threads,
               [&](size_t from, size_t to) { t.ggml->decode(w, begin + from, begin + to, out + from * w.k); });
}

}  // namespace bitfold
