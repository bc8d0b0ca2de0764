// Several rows of activations on the tile registers of AMX. A panel (panel.h) is a row of B tiles already; the loops
// around are those of gemm.h.
//
// T names the tile instructions, see isa/amx.cpp. Registers 0..3 hold sums, 4 and 5 activations (signed), 6 and 7
// weights (unsigned).
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
  chunk_sums(w, g, x, padded, row, R, w.offset, start, sums);
}

template <class S, class T, int R>
struct AmxBlock {
  static constexpr int kPanelStride = 2 * 64;  // bytes from 4 columns to the next 4 in a panel

  AmxBlock(const Scaled&, const Plan& g) { T::configure(tile_depth(g)); }
  ~AmxBlock() { T::release(); }

  // rows: those of the block that are wanted.
  void operator()(const Scaled& w, const Plan& g, size_t rows, size_t depth, const int8_t* x, const int32_t* start,
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
        add_row(w, products + r * 32, start[r], w.zero ? sums + r : nullptr, scales, c + r * 32);
      start += R;
      sums += w.zero ? R : 0;
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

  // c += (products + start) * scale - sum * scale * zero, as RegisterBlock has it.
  static void add_row(const Scaled& w, const int32_t* products, int32_t start, const float* sum, const float* scales,
                      float* c) {
    for (int h = 0; h < 2; ++h) {
      int32_t moved[16];
      for (int i = 0; i < 16; ++i) moved[i] = products[16 * h + i] + start;
      typename S::F f = S::fma(S::to_float(S::load(moved)), S::loadf(scales + 16 * h), S::loadf(c + 16 * h));
      if (w.zero) f = S::fma(S::set(-*sum), S::loadf(scales + 32 + 16 * h), f);
      S::storef(c + 16 * h, f);
    }
  }
};

template <class S>
size_t amx_scratch(const Scaled& w, size_t m, size_t padded) {
  const size_t few = few_scratch<S>(w, m, padded), panel = gemm_scratch<S, amx_rows<S>>(w, m, padded);
  return few > panel ? few : panel;
}

template <class S, class T, class W>
void amx_gemm8(const W& w, const Act8& a, size_t begin, size_t end, float* y, void* scratch) {
  uint8_t* panel = static_cast<uint8_t*>(scratch);
  if (a.m <= kMostFew) {
    if (!few8<S>(w, a, begin, end, y, scratch)) gemm_bytes<S>(w, a, begin, end, y, scratch);
    return;
  }
  if (amx_rows<S>(a.m) == 16) return gemm<S, 16, AmxBlock<S, T, 16>>(w, a, begin, end, y, panel);
  gemm<S, 32, AmxBlock<S, T, 32>>(w, a, begin, end, y, panel);
}

}  // namespace BITFOLD_NS
}  // namespace bitfold
