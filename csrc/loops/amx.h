// Several rows of activations on the tile registers of AMX. A panel (panel.h) is a row of B tiles already; the loops
// around are those of gemm.h.
//
// Of weights with groups a panel has what u - offset is, with a sign, less the zero points where they are whole: sums
// of products then need no correction but the scale.
//
// T names the tile instructions, see isa/amx.cpp. Registers 0..3 hold sums, 4 and 5 activations, 6 and 7 weights.
#pragma once
#include "loops/few.h"
#include "loops/gemm.h"
#include "loops/trellis.h"

namespace bitfold {
namespace BITFOLD_NS {

// Columns of one tile product: a chunk may be shorter than the 64 that a tile register holds.
inline size_t tile_depth(const Plan& g) { return g.chunk < 64 ? g.chunk : 64; }

// Up to kMostFew rows the loops of few.h win: 512 columns of a panel are not worth decoding for so few.
template <class S>
size_t amx_rows(size_t m) {
  return m <= kMostFew ? block_rows<S>(m) : m <= 16 ? 16 : 32;
}

// Whether sums of products are to be corrected for zero points.
inline bool corrects(const Scaled& w) { return w.zero && !w.whole; }

// u -> u - offset, or u - offset - zero (`group` columns share one); bytes wrap around to the right ones.
template <class S>
void sign_panel(const Scaled& w, size_t group, size_t row, size_t tiles, size_t column, size_t depth, size_t stride,
                uint8_t* panel) {
  constexpr size_t N = 2 * S::L;
  alignas(64) uint8_t less[4 * N];
  memset(less, w.offset, sizeof(less));
  const bool zeros = w.zero && w.whole;
  const size_t chunk = zeros ? group : depth;
  for (size_t t = 0; t < tiles; ++t)
    for (size_t done = 0; done < depth; done += chunk) {
      for (size_t i = 0; zeros && i < N; ++i) {
        const size_t at = smaller(row + t * N + i, w.n - 1) * w.groups + (w.group ? (column + done) / w.group : 0);
        memset(less + 4 * i, w.offset + static_cast<int>(param(w.zero, at, w.bf16)), 4);
      }
      uint8_t* quad = panel + t * stride + done * N;
      for (size_t c = 0; c < smaller(chunk, depth - done); c += 4, quad += 4 * N)
        for (size_t i = 0; i < 4 * N; ++i) quad[i] = static_cast<uint8_t>(quad[i] - less[i]);
    }
}

// As arrange_bytes; out: blocks x padded/depth x rows x depth.
template <class S>
void amx_arrange(const Scaled& w, const int8_t* x, size_t m, size_t padded, size_t row, int8_t* out, int32_t* start,
                 float* sums) {
  if (m <= kMostFew) return arrange_bytes<S>(w, x, m, padded, row, out, start, sums);
  const size_t R = amx_rows<S>(m);
  const Plan g = Plan::of<S>(w, m, padded, R);
  const size_t depth = tile_depth(g);
  int8_t* to = out + row / R * padded * R + row % R * depth;
  for (size_t c = 0; c < padded; c += depth) {
    if (x) {
      memcpy(to + c * R, x + c, depth);
    } else {
      memset(to + c * R, 0, depth);
    }
  }
  if (w.group == 0 || corrects(w)) chunk_sums(w, g, x, padded, row, R, w.offset, start, sums);
}

template <class S, class T, int R>
struct AmxBlock {
  static constexpr int kPanelStride = 2 * 64;  // bytes from 4 columns to the next 4 in a panel

  AmxBlock(const Scaled&, const Plan& g) { T::configure(tile_depth(g)); }
  ~AmxBlock() { T::release(); }

  static void ready(const Scaled& w, const Plan& g, size_t row, size_t tiles, size_t column, size_t depth,
                    uint8_t* panel) {
    sign_panel<S>(w, g.chunk, row, tiles, column, depth, g.stride, panel);
  }

  // rows: those of the block that are wanted.
  void operator()(const Scaled& w, const Plan& g, size_t rows, size_t depth, const int8_t* x, const int32_t*,
                  const float* sums, const uint8_t* tile, const float* scales, float* c, Fetch& fetch) const {
    const size_t step = tile_depth(g);
    const bool both = rows > 16;
    alignas(64) int32_t products[R * 32];
    for (size_t done = 0; done < depth; done += g.chunk) {
      clear(both);
      for (size_t i = smaller(g.chunk, depth - done) / step; i > 0;
           --i, tile += step / 4 * kPanelStride, x += R * step) {
        multiply(tile, x, step, both);
        for (size_t j = 0; j < step / 4; ++j) fetch.some<S>();
      }
      keep(products, both);
      for (size_t r = 0; r < rows; ++r)
        add_row(products + r * 32, corrects(w) ? sums + r : nullptr, scales, c + r * 32);
      sums += corrects(w) ? R : 0;
      scales += 64;
    }
  }

 private:
  static void clear(bool both) {
    T::template zero<0>();
    T::template zero<1>();
    if (R == 16 || !both) return;
    T::template zero<2>();
    T::template zero<3>();
  }

  static void multiply(const uint8_t* tile, const int8_t* x, size_t step, bool both) {
    T::template load<4>(x, step);
    T::template load<6>(tile, kPanelStride);
    T::template load<7>(tile + 64, kPanelStride);
    T::template dot<0, 4, 6>();
    T::template dot<1, 4, 7>();
    if (R == 16 || !both) return;
    T::template load<5>(x + 16 * step, step);
    T::template dot<2, 5, 6>();
    T::template dot<3, 5, 7>();
  }

  static void keep(int32_t* products, bool both) {
    T::template store<0>(products, 128);
    T::template store<1>(products + 16, 128);
    if (R == 16 || !both) return;
    T::template store<2>(products + 16 * 32, 128);
    T::template store<3>(products + 16 * 32 + 16, 128);
  }

  // c += products * scale - sum * scale * zero.
  static void add_row(const int32_t* products, const float* sum, const float* scales, float* c) {
    for (int h = 0; h < 2; ++h) {
      typename S::F f =
          S::fma(S::to_float(S::load(products + 16 * h)), S::loadf(scales + 16 * h), S::loadf(c + 16 * h));
      if (sum) f = S::fma(S::set(-*sum), S::loadf(scales + 32 + 16 * h), f);
      S::storef(c + 16 * h, f);
    }
  }
};

// Weights with one scale for a row. Sums of products stay integers until a row is whole: tiles are loaded and stored,
// and nothing else is done, between one panel and the next. 32 columns of a panel and 32 rows of activations lie in the
// first-level cache together.
template <class S, class T, class W>
class AmxWhole {
 public:
  static constexpr size_t kRows = 32, kDepth = 512;
  // Sums of so many products of bytes fit 32 bits.
  static bool fits(const Scaled& w, size_t padded) { return w.group == 0 && padded <= 65536; }

  static size_t scratch(size_t m) {
    return kTiles * 2 * S::L * (kDepth + sizeof(int32_t) * round_to(m) + 2 * sizeof(float));
  }

  AmxWhole(const W& w, const Act8& a, float* y, void* scratch)
      : w_(w), a_(a), y_(y), decode_(w), blocks_(round_to(a.m) / kRows), panel_(static_cast<uint8_t*>(scratch)) {
    sums_ = reinterpret_cast<int32_t*>(panel_ + kTiles * kStride);
    scales_ = reinterpret_cast<float*>(sums_ + kTiles * blocks_ * kRows * kWide);
  }

  void run(size_t begin, size_t end) {
    T::configure(64);
    for (size_t row = begin; row < end; row += kTiles * kWide) {
      const size_t tiles = smaller(kTiles, (end - row + kWide - 1) / kWide);
      for (size_t k = 0; k < a_.padded; k += kDepth) {
        const size_t depth = smaller(kDepth, a_.padded - k);
        decode_(w_, row, tiles, k, depth, kStride, panel_);
        const bool last = k + kDepth >= a_.padded;
        Fetch fetch(w_, last ? row + kTiles * kWide : row, kTiles * kWide, last ? 0 : k + kDepth, kDepth,
                    tiles * blocks_ * depth / 64);
        for (size_t t = 0; t < tiles; ++t)
          for (size_t b = 0; b < blocks_; ++b) block(t, b, k, depth, fetch);
      }
      write(row, end, tiles);
    }
    T::release();
  }

 private:
  static constexpr size_t kWide = 2 * S::L, kStride = kWide * kDepth, kPanelStride = 2 * 64;

  static size_t round_to(size_t m) { return (m + kRows - 1) / kRows * kRows; }
  int32_t* sums(size_t t, size_t b) { return sums_ + (t * blocks_ + b) * kRows * kWide; }

  void block(size_t t, size_t b, size_t k, size_t depth, Fetch& fetch) {
    const uint8_t* tile = panel_ + t * kStride;
    const int8_t* x = a_.x + (b * a_.padded + k) * kRows;
    int32_t* c = sums(t, b);
    if (k == 0) {
      T::template zero<0>();
      T::template zero<1>();
      T::template zero<2>();
      T::template zero<3>();
    } else {
      T::template load<0>(c, 128);
      T::template load<1>(c + 16, 128);
      T::template load<2>(c + 16 * 32, 128);
      T::template load<3>(c + 16 * 32 + 16, 128);
    }
    for (size_t i = depth / 64; i > 0; --i, tile += 16 * kPanelStride, x += kRows * 64) {
      T::template load<4>(x, 64);
      T::template load<6>(tile, kPanelStride);
      T::template load<7>(tile + 64, kPanelStride);
      T::template dot_unsigned<0, 4, 6>();
      T::template dot_unsigned<1, 4, 7>();
      T::template load<5>(x + 16 * 64, 64);
      T::template dot_unsigned<2, 5, 6>();
      T::template dot_unsigned<3, 5, 7>();
      fetch.some<S>();
    }
    T::template store<0>(c, 128);
    T::template store<1>(c + 16, 128);
    T::template store<2>(c + 16 * 32, 128);
    T::template store<3>(c + 16 * 32 + 16, 128);
  }

  // (sums + start) * scale - sum of x * scale * zero, times the scale of the activations: of each row of activations
  // all that is there, for rows of y lie pages apart.
  void write(size_t row, size_t end, size_t tiles) {
    const Plan g = Plan::of<S>(w_, a_.m, a_.padded, kRows);
    for (size_t t = 0; t < tiles; ++t) tile_scales<S>(w_, g, row + t * kWide, 0, scales_ + t * 2 * kWide);
    for (size_t i = 0; i < a_.m; ++i) {
      const size_t at = i / kRows * g.chunks * kRows + i % kRows;
      int32_t start = 0;
      float sum = 0;
      for (size_t j = 0; j < g.chunks; ++j) {
        start += a_.start[at + j * kRows];
        if (w_.zero) sum += a_.sums[at + j * kRows];
      }
      for (size_t t = 0; t < tiles; ++t) {
        const int32_t* c = sums(t, i / kRows) + i % kRows * kWide;
        const size_t n = row + t * kWide;
        float out[kWide], *to = y_ + i / a_.planes * w_.n + n;
        const bool direct = n + kWide <= end && i % a_.planes == 0;
        finish(c, start, sum, scales_ + t * 2 * kWide, a_.scale[i], direct ? to : out);
        if (!direct) write_row(out, 1.0f, smaller(kWide, end - n), i % a_.planes != 0, to);
      }
    }
  }

  static void finish(const int32_t* c, int32_t start, float sum, const float* scales, float scale, float* out) {
    for (size_t j = 0; j < kWide; ++j)
      out[j] = (static_cast<float>(c[j] + start) * scales[j] - sum * scales[kWide + j]) * scale;
  }

  const W& w_;
  const Act8& a_;
  float* y_;
  const Panels<S, W> decode_;
  const size_t blocks_;
  uint8_t* panel_;
  int32_t* sums_;
  float* scales_;
};

template <class S>
size_t amx_scratch(const Scaled& w, size_t m, size_t padded) {
  const size_t few = few_scratch<S>(w, m, padded), panel = gemm_scratch<S, amx_rows<S>>(w, m, padded);
  const size_t most = few > panel ? few : panel, whole = AmxWhole<S, void, DenseWeight>::scratch(m);
  return most > whole ? most : whole;
}

template <class S, class T, class W>
void amx_gemm8(const W& w, const Act8& a, size_t begin, size_t end, float* y, void* scratch) {
  uint8_t* panel = static_cast<uint8_t*>(scratch);
  if (a.m <= kMostFew) {
    if (!few8<S>(w, a, begin, end, y, scratch)) gemm_bytes<S>(w, a, begin, end, y, scratch);
    return;
  }
  if (a.m > 16 && AmxWhole<S, T, W>::fits(w, a.padded)) return AmxWhole<S, T, W>(w, a, y, scratch).run(begin, end);
  if (amx_rows<S>(a.m) == 16) return gemm<S, 16, AmxBlock<S, T, 16>>(w, a, begin, end, y, panel);
  gemm<S, 32, AmxBlock<S, T, 32>>(w, a, begin, end, y, panel);
}

}  // namespace BITFOLD_NS
}  // namespace bitfold
