#include "linear.h"

#include <algorithm>
#include <cstring>
#include <new>

#include "dispatch.h"
#include "packing.h"
#include "threads.h"

namespace bitfold {
namespace {

constexpr size_t kGemmFrom = kMaxRows + 1;  // rows of activations from which decoding into a panel pays
constexpr size_t kGemmRows = 256;           // rows of activations that one panel serves before the next is decoded
constexpr size_t kRowGrain = 64;            // rows of the weight that a thread takes at least

size_t round_up(size_t x, size_t to) { return (x + to - 1) / to * to; }

// Memory that is kept from call to call, one piece for each thread and purpose, aligned to cache lines.
class Scratch {
 public:
  ~Scratch() { release(); }

  template <class T>
  T* get(size_t count) {
    const size_t bytes = count * sizeof(T);
    if (bytes > size_) {
      release();
      memory_ = ::operator new(round_up(bytes, 4096), kAlign);
      size_ = round_up(bytes, 4096);
    }
    return static_cast<T*>(memory_);
  }

 private:
  static constexpr std::align_val_t kAlign{64};
  void release() {
    if (memory_) ::operator delete(memory_, kAlign);
    memory_ = nullptr;
    size_ = 0;
  }
  void* memory_ = nullptr;
  size_t size_ = 0;
};

thread_local Scratch codes_memory, rows_memory, start_memory, sums_memory, panel_memory, float_memory;

// The least number of rows that gemv has code for.
size_t batch_of(size_t m) { return m <= 1 ? 1 : m <= 4 ? 4 : 8; }

size_t runs_of(const Weight& w, const Table& t, size_t padded) {
  const size_t step = 4 * t.lanes, steps = padded / step;
  const size_t per = w.group == 0 ? steps : w.group % step ? 1 : w.group / step;
  return (steps + per - 1) / per;
}

// x -> 8 bits, row-major (m, padded), and their scales.
int8_t* quantize_rows(const Table& t, const Weight& w, const float* x, size_t m, size_t padded, float* scales) {
  int8_t* out = codes_memory.get<int8_t>(m * padded);
  for (size_t i = 0; i < m; ++i) scales[i] = t.quantize(x + i * w.k, w.k, padded, out + i * padded);
  return out;
}

// Row-major (m, padded) -> (steps, batch, step), rows from m on zero.
const int8_t* interleave(const int8_t* x, size_t m, size_t batch, size_t padded, size_t step) {
  if (batch == 1) return x;
  int8_t* out = rows_memory.get<int8_t>(batch * padded);
  for (size_t c = 0; c < padded; c += step)
    for (size_t b = 0; b < batch; ++b, out += step) {
      if (b < m) {
        std::memcpy(out, x + b * padded + c, step);
      } else {
        std::memset(out, 0, step);
      }
    }
  return out - batch * padded;
}

void gemv8(const Table& t, const Weight& w, const float* x, size_t m, float* y, int threads) {
  float scales[kMaxRows];
  const size_t batch = batch_of(m);
  Act8 a;
  a.m = m;
  a.padded = round_up(w.k, kPad);
  a.x = interleave(quantize_rows(t, w, x, m, a.padded, scales), m, batch, a.padded, 4 * t.lanes);
  a.scale = scales;
  int32_t* start = start_memory.get<int32_t>(batch * runs_of(w, t, a.padded) * t.lanes);
  float* sums = w.zero ? sums_memory.get<float>(m * w.groups) : nullptr;
  t.sums8(w, a.x, m, batch, a.padded, start, sums);
  a.start = start;
  a.sums = sums;
  parallel_for(w.n, kRowGrain, threads, [&](size_t begin, size_t end) { t.gemv8(w, a, begin, end, y); });
}

void gemvf(const Table& t, const Weight& w, const float* x, size_t m, bool int8, float* y, int threads) {
  float scales[kMaxRows];
  const size_t batch = batch_of(m);
  ActF a;
  a.m = m;
  a.padded = round_up(w.k, kPad);
  float* out = rows_memory.get<float>(batch * a.padded);
  float* sums = w.zero ? sums_memory.get<float>(m * w.groups) : nullptr;
  const int8_t* codes = int8 ? quantize_rows(t, w, x, m, a.padded, scales) : nullptr;
  float* as_float = int8 ? float_memory.get<float>(a.padded) : nullptr;
  if (m < batch) std::memset(out, 0, batch * a.padded * sizeof(float));
  for (size_t i = 0; i < m; ++i) {
    for (size_t c = 0; int8 && c < w.k; ++c) as_float[c] = codes[i * a.padded + c];  // points that are not integers
    t.arrange(w, int8 ? as_float : x + i * w.k, i, batch, a.padded, out, w.zero ? sums + i * w.groups : nullptr);
  }
  a.x = out;
  a.sums = sums;
  parallel_for(w.n, kRowGrain, threads, [&](size_t begin, size_t end) {
    t.gemvf(w, a, begin, end, y);
    for (size_t i = 0; int8 && i < m; ++i)
      for (size_t n = begin; n < end; ++n) y[i * w.n + n] *= scales[i];
  });
}

void gemm8(const Table& t, const Weight& w, const float* x, size_t m, float* y, int threads) {
  Act8 a;
  a.m = m;
  a.padded = round_up(w.k, kPad);
  float* scales = float_memory.get<float>(m);
  const int8_t* rows = quantize_rows(t, w, x, m, a.padded, scales);
  const size_t blocked = round_up(m, t.gemm_rows);
  const size_t chunks = (a.padded + (w.group ? w.group : kWholeRow) - 1) / (w.group ? w.group : kWholeRow);
  int8_t* out = rows_memory.get<int8_t>(blocked * a.padded);
  int32_t* start = start_memory.get<int32_t>(blocked * chunks);
  float* sums = w.zero ? sums_memory.get<float>(blocked * chunks) : nullptr;
  t.arrange8(w, rows, m, a.padded, out, start, sums);
  a.x = out;
  a.start = start;
  a.sums = sums;
  a.scale = scales;
  parallel_for(w.n, 2 * t.lanes, threads, [&](size_t begin, size_t end) {
    t.gemm8(w, a, begin, end, y, panel_memory.get<uint8_t>(t.gemm8_scratch(w, a)));
  });
}

}  // namespace

void matmul(const Weight& w, const float* x, size_t m, bool int8, float* y, int threads) {
  const Table& t = table();
  if (w.k == 0) {
    std::memset(y, 0, m * w.n * sizeof(float));
    return;
  }
  if (w.n == 0) return;
  const bool integers = int8 && w.integers;
  for (size_t at = 0; at < m;) {
    const size_t left = m - at;
    const size_t rows = integers && left >= kGemmFrom ? std::min(left, kGemmRows) : std::min(left, kMaxRows);
    const float* from = x + at * w.k;
    float* to = y + at * w.n;
    if (!integers) {
      gemvf(t, w, from, rows, int8, to, threads);
    } else if (rows > kMaxRows) {
      gemm8(t, w, from, rows, to, threads);
    } else {
      gemv8(t, w, from, rows, to, threads);
    }
    at += rows;
  }
}

void dequantize(const Weight& w, size_t begin, size_t end, float* out, int threads) {
  const Table& t = table();
  parallel_for(end - begin, 1 + (1 << 16) / (w.k + 1), threads, [&](size_t from, size_t to) {
    uint8_t* codes = codes_memory.get<uint8_t>(w.k);
    for (size_t r = from; r < to; ++r) {
      unpack_row(w.codes + (begin + r) * w.row_bytes, w.k, w.bits, codes);
      t.decode(w, begin + r, codes, out + r * w.k);
    }
  });
}

}  // namespace bitfold
