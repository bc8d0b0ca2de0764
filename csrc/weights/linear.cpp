#include "weights/linear.h"

#include <algorithm>
#include <cstring>

#include "system/dispatch.h"
#include "system/scratch.h"
#include "system/threads.h"
#include "weights/dense/packing.h"

namespace bitfold {
namespace {

constexpr size_t kMostRows = 256;  // rows of activations that one panel serves before the next is decoded

size_t round_up(size_t x, size_t to) { return (x + to - 1) / to * to; }

thread_local Scratch codes_memory, rows_memory, start_memory, sums_memory, panel_memory, float_memory;

size_t runs_of(const Scaled& w, const Table& t, size_t padded) {
  const size_t step = 4 * t.lanes, steps = padded / step;
  const size_t per = w.group == 0 ? steps : w.group % step ? 1 : w.group / step;
  return (steps + per - 1) / per;
}

constexpr size_t kArranged = 16;  // rows of activations that a thread rounds and arranges at least

// Rows [begin, end) of x -> 8 bits, row-major (m, padded), and their scales.
void quantize_rows(const Table& t, const Scaled& w, const float* x, size_t padded, size_t begin, size_t end,
                   int8_t* out, float* scales) {
  for (size_t i = begin; i < end; ++i) scales[i] = t.quantize(x + i * w.k, w.k, padded, out + i * padded);
}

// One row of activations.
template <class W>
void gemv8(const Table& t, const W& w, const float* x, float* y, int threads) {
  float scale;
  Act8 a;
  a.m = 1;
  a.padded = round_up(w.k, kPad);
  int8_t* codes = codes_memory.get<int8_t>(a.padded);
  quantize_rows(t, w, x, a.padded, 0, 1, codes, &scale);
  a.x = codes;
  a.scale = &scale;
  int32_t* start = start_memory.get<int32_t>(runs_of(w, t, a.padded) * t.lanes);
  float* sums = w.zero ? sums_memory.get<float>(w.groups) : nullptr;
  t.sums8(w, a.x, a.padded, start, sums);
  a.start = start;
  a.sums = sums;
  parallel_for(w.n, kRowGrain, threads, [&](size_t begin, size_t end) { t.products<W>().gemv8(w, a, begin, end, y); });
}

template <class W>
void gemvf(const Table& t, const W& w, const float* x, const float* scale, float* y, int threads) {
  ActF a;
  a.m = 1;
  a.padded = round_up(w.k, kPad);
  float* out = rows_memory.get<float>(a.padded);
  float* sums = w.zero ? sums_memory.get<float>(w.groups) : nullptr;
  t.products<W>().arrange(w, x, a.padded, out, sums);
  a.x = out;
  a.sums = sums;
  parallel_for(w.n, kRowGrain, threads, [&](size_t begin, size_t end) {
    t.products<W>().gemvf(w, a, begin, end, y);
    for (size_t n = begin; scale && n < end; ++n) y[n] *= *scale;
  });
}

// Numbers kept for every row and chunk: chunks are at least as long as the shortest group.
size_t sums_of(size_t block_rows, size_t m, size_t padded) { return round_up(m, block_rows) * (padded / 16 + 1); }

template <class W>
void gemm8(const Table& t, const W& w, const float* x, size_t m, float* y, int threads) {
  Act8 a;
  a.m = m;
  a.padded = round_up(w.k, kPad);
  float* scales = float_memory.get<float>(m);
  const size_t all = round_up(m, t.block_rows(m));
  int8_t *codes = codes_memory.get<int8_t>(m * a.padded), *out = rows_memory.get<int8_t>(all * a.padded);
  int32_t* start = start_memory.get<int32_t>(sums_of(t.block_rows(m), m, a.padded));
  float* sums = w.zero ? sums_memory.get<float>(sums_of(t.block_rows(m), m, a.padded)) : nullptr;
  parallel_for(all, kArranged, threads, [&](size_t begin, size_t end) {
    quantize_rows(t, w, x, a.padded, begin, std::min(end, m), codes, scales);
    t.arrange8(w, codes, m, a.padded, begin, end, out, start, sums);
  });
  a.x = out;
  a.start = start;
  a.sums = sums;
  a.scale = scales;
  parallel_for(w.n, kRowGrain, threads, [&](size_t begin, size_t end) {
    t.products<W>().gemm8(w, a, begin, end, y, panel_memory.get<uint8_t>(t.gemm_scratch(w, a.m, a.padded)));
  });
}

template <class W>
void gemmf(const Table& t, const W& w, const float* x, size_t m, const float* scales, float* y, int threads) {
  ActF a;
  a.m = m;
  a.padded = round_up(w.k, kPad);
  const size_t all = round_up(m, t.block_rowsf(m));
  float* out = rows_memory.get<float>(all * a.padded);
  float* sums = w.zero ? sums_memory.get<float>(sums_of(t.block_rowsf(m), m, a.padded)) : nullptr;
  parallel_for(all, kArranged, threads,
               [&](size_t begin, size_t end) { t.arrangef(w, x, m, a.padded, begin, end, out, sums); });
  a.x = out;
  a.sums = sums;
  a.scale = scales;
  parallel_for(w.n, kRowGrain, threads, [&](size_t begin, size_t end) {
    t.products<W>().gemmf(w, a, begin, end, y, panel_memory.get<uint8_t>(t.gemm_scratchf(w, a.m, a.padded)));
  });
}

// Activations rounded to 8 bits, times points that are not integers.
template <class W>
void rounded(const Table& t, const W& w, const float* x, size_t m, float* y, int threads) {
  const size_t padded = round_up(w.k, kPad);
  float* scales = float_memory.get<float>(m + m * w.k);
  float* codes = scales + m;
  int8_t* rows = codes_memory.get<int8_t>(m * padded);
  parallel_for(m, kArranged, threads, [&](size_t begin, size_t end) {
    quantize_rows(t, w, x, padded, begin, end, rows, scales);
    for (size_t i = begin; i < end; ++i)
      for (size_t c = 0; c < w.k; ++c) codes[i * w.k + c] = rows[i * padded + c];
  });
  m > 1 ? gemmf(t, w, codes, m, scales, y, threads) : gemvf(t, w, codes, scales, y, threads);
}

// Rows that a thread decodes at least.
size_t decode_grain(const Scaled& w) { return 32 + (1 << 16) / (w.k + 1); }

template <class W>
void matmul_with(const W& w, const float* x, size_t m, bool int8, float* y, int threads) {
  const Table& t = table();
  if (w.k == 0) {
    std::memset(y, 0, m * w.n * sizeof(float));
    return;
  }
  if (w.n == 0) return;
  for (size_t at = 0; at < m; at += kMostRows) {
    const size_t rows = std::min(m - at, kMostRows);
    const float* from = x + at * w.k;
    float* to = y + at * w.n;
    if (int8 && !w.integers) {
      rounded(t, w, from, rows, to, threads);
    } else if (rows > 1) {
      int8 ? gemm8(t, w, from, rows, to, threads) : gemmf(t, w, from, rows, nullptr, to, threads);
    } else {
      int8 ? gemv8(t, w, from, to, threads) : gemvf(t, w, from, nullptr, to, threads);
    }
  }
}

}  // namespace

void matmul(const DenseWeight& w, const float* x, size_t m, bool int8, float* y, int threads) {
  matmul_with(w, x, m, int8, y, threads);
}

void matmul(const TrellisWeight& w, const float* x, size_t m, bool int8, float* y, int threads) {
  matmul_with(w, x, m, int8, y, threads);
}

void dequantize(const DenseWeight& w, size_t begin, size_t end, float* out, int threads) {
  const Table& t = table();
  parallel_for(end - begin, decode_grain(w), threads, [&](size_t from, size_t to) {
    uint8_t* codes = codes_memory.get<uint8_t>(w.k);
    for (size_t r = from; r < to; ++r) {
      unpack_row(w.codes + (begin + r) * w.row_bytes, w.k, w.bits, codes);
      t.decode(w, begin + r, codes, out + r * w.k);
    }
  });
}

void dequantize(const TrellisWeight& w, size_t begin, size_t end, float* out, int threads) {
  const Table& t = table();
  parallel_for(end - begin, decode_grain(w), threads,
               [&](size_t from, size_t to) { t.decode_tiles(w, begin + from, begin + to, out + from * w.k); });
}

}  // namespace bitfold
