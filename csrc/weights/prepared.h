// Activations made ready for one kind of weight, and multiplied by it.
//
// Rows can be made ready by any threads, each rows of its own; when all are, any threads multiply them by rows of the
// weight of their own. An object of this class is a view of memory: every thread makes one for itself.
#pragma once
#include <cstring>

#include "system/dispatch.h"
#include "system/scratch.h"
#include "weights/dense/weight.h"
#include "weights/ggml/weight.h"
#include "weights/lattice/e8p.h"
#include "weights/trellis/weight.h"

namespace bitfold {

inline size_t round_up(size_t x, size_t to) { return (x + to - 1) / to * to; }

// Memory of this thread for one row on its way, for the panels of gemm, and for rows that are decoded before.
struct RowMemory {
  Scratch codes, floats, panel, rows;
  static RowMemory& mine() {
    static thread_local RowMemory memory;
    return memory;
  }
};

// With int8, a row is rounded to 8 bits with one scale (codes = round(x * 127 / absmax)); one that holds NaN or
// infinity gives NaN. Floats are split into kPlanes rows of bytes where that is faster: then their products are
// integers, too, and a code is decoded once for all of them.
template <class W>
class Prepared {
 public:
  // Bytes of memory for m rows; a multiple of 64.
  static size_t bytes(const W& w, size_t m, bool int8) { return Prepared(w, m, int8, nullptr).bytes_; }

  // memory: aligned to 64 bytes.
  Prepared(const W& w, size_t m, bool int8, void* memory)
      : w_(w),
        t_(table()),
        planes_(!int8 && splits(w, m, t_) ? kPlanes : 1),
        m_(m * planes_),
        padded_(round_up(w.k, kPad)),
        int8_(int8),
        bytes_in_(w.integers && (int8 || planes_ > 1)),
        by_row_(bytes_in_ ? by_row(w, m, planes_) : m == 1) {
    const size_t block = by_row_ ? planes_ * (m == 3 ? 4 : m) : bytes_in_ ? t_.block_rows(m_) : t_.block_rowsf(m_);
    rows_ = round_up(m_, block);
    char* at = static_cast<char*>(memory);
    const auto take = [&](size_t size) {
      char* mine = at;
      at += round_up(size, 64);
      bytes_ += round_up(size, 64);
      return mine;
    };
    // Numbers kept for every row, lane by lane or for each chunk (which are at least as long as the shortest group).
    const size_t chunks = rows_ * (by_row_ ? padded_ / 4 + t_.lanes : padded_ / 16 + 1) * 4;
    scale_ = reinterpret_cast<float*>(take(m_ * sizeof(float)));
    x_ = take(rows_ * padded_ * (bytes_in_ ? 1 : sizeof(float)));
    start_ = reinterpret_cast<int32_t*>(take(bytes_in_ ? chunks : 0));
    sums_ = reinterpret_cast<float*>(take(w.zero ? chunks : 0));
    if (!w.zero) sums_ = nullptr;
  }

  // Row i, of w.k numbers; the last one brings along what fills up its block.
  void row(size_t i, const float* x) const {
    RowMemory& memory = RowMemory::mine();
    if (planes_ > 1) {
      int8_t* codes = by_row_ ? place(i) : memory.codes.get<int8_t>(planes_ * padded_);
      t_.split(x, w_.k, padded_, codes, scale_ + i * planes_);
      if (by_row_) return sums(i);
      for (size_t p = 0; p < planes_; ++p) arrange(i * planes_ + p, codes + p * padded_);
      return;
    }
    if (int8_) {
      int8_t* codes = by_row_ && bytes_in_ ? place(i) : memory.codes.get<int8_t>(padded_);
      scale_[i] = t_.quantize(x, w_.k, padded_, codes);
      if (bytes_in_) return arrange(i, codes);
      float* floats = memory.floats.get<float>(w_.k);
      for (size_t c = 0; c < w_.k; ++c) floats[c] = codes[c];
      x = floats;
    }
    arrange(i, x);
  }

  // y (m, w.n): rows [begin, end) of the weight; begin is a multiple of kBandRows, and end, if it is not w.n.
  void times(size_t begin, size_t end, float* y) const { times(w_, begin, end, y); }

  // The same with a weight of the same shape, of which no other rows are there.
  void times(const W& w, size_t begin, size_t end, float* y) const {
    const Products<W>& products = t_.products<W>();
    if (bytes_in_) {
      Act8 a;
      a.m = m_, a.planes = planes_, a.padded = padded_, a.x = reinterpret_cast<const int8_t*>(x_), a.scale = scale_;
      a.start = start_, a.sums = sums_;
      if (by_row_) return products.gemv8(w, a, begin, end, y);
      const size_t scratch = t_.gemm_scratch(w, m_, padded_);
      return products.gemm8(w, a, begin, end, y, RowMemory::mine().panel.get<uint8_t>(scratch));
    }
    ActF a;
    a.m = m_, a.padded = padded_, a.x = reinterpret_cast<const float*>(x_), a.sums = sums_;
    a.scale = int8_ ? scale_ : nullptr;
    if (m_ > 1) {
      const size_t scratch = t_.gemm_scratchf(w, m_, padded_);
      return products.gemmf(w, a, begin, end, y, RowMemory::mine().panel.get<uint8_t>(scratch));
    }
    products.gemvf(w, a, begin, end, y);
    for (size_t n = begin; int8_ && n < end; ++n) y[n] *= *scale_;
  }

 private:
  // Row i for gemv8, which takes four for three.
  int8_t* place(size_t i) const { return reinterpret_cast<int8_t*>(x_) + i * planes_ * padded_; }
  void sums(size_t i) const {
    t_.sums8(w_, place(i), planes_, padded_, i, start_, sums_);
    if (i != 2 || m_ != 3 * planes_) return;
    memset(place(3), 0, planes_ * padded_);
    t_.sums8(w_, place(3), planes_, padded_, 3, start_, sums_);
  }

  void arrange(size_t i, const int8_t* codes) const {
    int8_t* out = reinterpret_cast<int8_t*>(x_);
    if (by_row_) return sums(i);
    t_.arrange8(w_, codes, m_, padded_, i, out, start_, sums_);
    for (size_t r = m_; i + 1 == m_ && r < rows_; ++r) t_.arrange8(w_, nullptr, m_, padded_, r, out, start_, sums_);
  }

  void arrange(size_t i, const float* x) const {
    float* out = reinterpret_cast<float*>(x_);
    if (m_ == 1) return t_.products<W>().arrange(w_, x, padded_, out, sums_);
    t_.arrangef(w_, x, m_, padded_, i, out, sums_);
    for (size_t r = m_; i + 1 == m_ && r < rows_; ++r) t_.arrangef(w_, nullptr, m_, padded_, r, out, sums_);
  }

  const W& w_;
  const Table& t_;
  // Sums of products of so many columns fit 32 bits.
  static bool splits(const W& w, size_t m, const Table& t) { return w.integers && m <= t.split_rows && w.k <= 1 << 16; }
  // Whether gemv8 is the faster way, as measured: where loops/few.h has these bits, it is for more rows; what is done
  // for each group is done for every plane of every row.
  static bool by_row(const DenseWeight& w, size_t m, size_t planes) {
    const bool few = w.bits == 2 || w.bits == 3 || w.bits == 4;
    const size_t most = w.group == 0 ? (few ? 6 : 12) : w.group < 32 ? 12 : 2;
    return m == 1 || (m <= 4 && m * planes <= most);
  }
  static bool by_row(const TrellisWeight&, size_t m, size_t planes) { return m * planes == 1; }

  const size_t planes_, m_, padded_;  // m: rows of bytes or floats, planes of each
  const bool int8_, bytes_in_;        // rounded; multiplied as bytes
  const bool by_row_;                 // as gemv8 reads them (gemvf reads one row of floats)
  size_t rows_ = 0, bytes_ = 0;
  float *scale_ = nullptr, *sums_ = nullptr;
  char* x_ = nullptr;
  int32_t* start_ = nullptr;
};

// A few rows are rounded to 15 bits (of 8 bits, that loses nothing more); many stay float32.
template <>
class Prepared<GgmlWeight> {
 public:
  static size_t bytes(const GgmlWeight& w, size_t m, bool int8) {
    const TileProducts& tiles = table().tiles;
    if (m >= tiles.least) return round_up(tiles.bytes(m, w.k), 64);
    return round_up(GgmlActs::bytes(m, w.k), 64) + Prepared(w, m, int8, nullptr).rows_ * GgmlActs::padded_of(w.k) * 4;
  }

  Prepared(const GgmlWeight& w, size_t m, bool int8, void* memory)
      : w_(w), t_(table()), m_(m), rows_(round_up(m, t_.block_rowsf(m))), int8_(int8), acts_(memory, m, w.k) {
    floats_ = static_cast<float*>(memory);
    shape_.k = w.k;
  }

  void row(size_t i, const float* x) const {
    RowMemory& memory = RowMemory::mine();
    if (int8_) {
      int8_t* codes = memory.codes.get<int8_t>(w_.k);
      float* floats = memory.floats.get<float>(w_.k);
      const float scale = t_.quantize(x, w_.k, w_.k, codes);
      for (size_t c = 0; c < w_.k; ++c) floats[c] = codes[c] * scale;
      x = floats;
    }
    if (m_ >= t_.tiles.least) return t_.tiles.row(x, w_.k, i, floats_);
    if (m_ <= kFew) return t_.ggml->round(x, w_.k, acts_, i);
    t_.arrangef(shape_, x, m_, acts_.padded, i, floats_, nullptr);
    for (size_t r = m_; i + 1 == m_ && r < rows_; ++r)
      t_.arrangef(shape_, nullptr, m_, acts_.padded, r, floats_, nullptr);
  }

  void times(size_t begin, size_t end, float* y) const {
    if (m_ >= t_.tiles.least) {
      uint8_t* scratch = RowMemory::mine().panel.get<uint8_t>(t_.tiles.scratch(m_));
      return t_.tiles.ggml(w_, floats_, m_, begin, end, y, scratch);
    }
    if (m_ <= kFew) return t_.ggml->few(w_, acts_, begin, end, y);
    ActF a;
    a.m = m_, a.padded = acts_.padded, a.x = floats_;
    t_.ggml->gemm(w_, a, begin, end, y, RowMemory::mine().panel.get<float>(t_.ggml->scratch(m_) / sizeof(float)));
  }

 private:
  static constexpr size_t kFew = 8;
  const GgmlWeight& w_;
  const Table& t_;
  const size_t m_, rows_;
  const bool int8_;
  const GgmlActs acts_;
  float* floats_;
  Scaled shape_;
};

// Points of a lattice become bytes, some rows at a time; activations are those for bytes.
template <>
class Prepared<LatticeWeight> {
 public:
  static size_t bytes(const LatticeWeight& w, size_t m, bool int8) {
    return Prepared<DenseWeight>::bytes(in_bytes(w), m, int8);
  }
  Prepared(const LatticeWeight& w, size_t m, bool int8, void* memory)
      : w_(w), shape_(in_bytes(w)), acts_(shape_, m, int8, memory) {}

  void row(size_t i, const float* x) const { acts_.row(i, x); }

  void times(size_t begin, size_t end, float* y) const {
    const size_t step = rows_at_a_time(w_);
    uint8_t* bytes = RowMemory::mine().rows.get<uint8_t>(step * w_.k + 64);
    for (size_t at = begin; at < end; at += step) {
      const size_t stop = at + step < end ? at + step : end;
      unpack_rows(w_, at, stop, bytes);
      DenseWeight part = shape_;
      // Where row 0 would be: rows are counted from it, and only those from `at` on are read.
      part.codes = reinterpret_cast<const uint8_t*>(reinterpret_cast<uintptr_t>(bytes) - at * w_.k);
      acts_.times(part, at, stop, y);
    }
  }

 private:
  const LatticeWeight& w_;
  const DenseWeight shape_;
  const Prepared<DenseWeight> acts_;
};

// Unquantized rows take activations as they are, or in tiles.
template <>
class Prepared<PlainRows> {
 public:
  static size_t bytes(const PlainRows& w, size_t m, bool) {
    return round_up(in_tiles(w, m) ? table().tiles.bytes(m, w.k) : m * w.k * sizeof(float), 64);
  }
  Prepared(const PlainRows& w, size_t m, bool, void* memory)
      : w_(w), t_(table()), m_(m), x_(static_cast<float*>(memory)) {}

  void row(size_t i, const float* x) const {
    if (in_tiles(w_, m_)) return t_.tiles.row(x, w_.k, i, x_);
    std::memcpy(x_ + i * w_.k, x, w_.k * sizeof(float));
  }

  void times(size_t begin, size_t end, float* y) const {
    if (!in_tiles(w_, m_)) return t_.plain_rows(w_, x_, m_, begin, end, y);
    t_.tiles.plain(w_, x_, m_, begin, end, y, RowMemory::mine().panel.get<uint8_t>(t_.tiles.scratch(m_)));
  }

 private:
  static bool in_tiles(const PlainRows& w, size_t m) { return w.bf16 && m >= table().tiles.least; }

  const PlainRows& w_;
  const Table& t_;
  const size_t m_;
  float* x_;
};

}  // namespace bitfold
