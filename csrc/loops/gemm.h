// Many rows of activations in 8 bits: panels of the weight are decoded once into the cache and used for all of them.
//
// Decoded weights lie as dot products want them: for 4 columns, S::L rows of 4 bytes each; a tile is two such vectors
// wide. Activations lie in blocks of S::kGemmRows rows, 4 columns of each row in turn. Integers are summed over a chunk
// of columns that share scales, then scaled into float accumulators that stay in the cache.
#pragma once
#include "loops/params.h"

namespace bitfold {
namespace BITFOLD_NS {

constexpr size_t kTiles = 4;          // tiles of a panel
constexpr size_t kPanelDepth = 1024;  // columns of a panel, if the chunks allow

struct Gemm {
  size_t chunk;   // columns summed in integers
  size_t chunks;  // in a row
  size_t depth;   // columns of a panel: whole chunks
  size_t blocks;  // of activation rows

  template <class S>
  static Gemm plan(const Weight& w, size_t m, size_t padded) {
    Gemm g;
    g.chunk = w.group ? w.group : kWholeRow;
    g.chunks = (padded + g.chunk - 1) / g.chunk;
    g.depth = g.chunk * (g.chunk < kPanelDepth ? kPanelDepth / g.chunk : 1);
    g.blocks = (m + S::kGemmRows - 1) / S::kGemmRows;
    return g;
  }
};

// x (m, padded) -> out: blocks x padded/4 x kGemmRows x 4 bytes; start, sums: blocks x chunks x kGemmRows.
template <class S>
void arrange_blocks(const Weight& w, const int8_t* x, size_t m, size_t padded, int8_t* out, int32_t* start,
                    float* sums) {
  constexpr size_t R = S::kGemmRows;
  const Gemm g = Gemm::plan<S>(w, m, padded);
  const int offset = w.offset - S::centre(w.bits);
  for (size_t b = 0; b < g.blocks; ++b)
    for (size_t r = 0; r < R; ++r) {
      const size_t row = b * R + r;
      int8_t* to = out + b * padded * R + r * 4;
      for (size_t c = 0; c < padded; c += 4) {
        if (row < m) {
          memcpy(to + c * R, x + row * padded + c, 4);
        } else {
          memset(to + c * R, 0, 4);
        }
      }
      for (size_t i = 0; i < g.chunks; ++i) {
        int32_t sum = 0;
        if (row < m)
          for (size_t c = i * g.chunk; c < smaller(padded, (i + 1) * g.chunk); ++c) sum += x[row * padded + c];
        start[(b * g.chunks + i) * R + r] = -offset * sum;
        if (w.zero) sums[(b * g.chunks + i) * R + r] = static_cast<float>(sum);
      }
    }
}

// Rows [row, row + 2L) and `depth` columns from `column` on; rows behind the last repeat it.
template <class S, class C>
void decode_tile(const Weight& w, const C& codec, size_t row, size_t column, size_t depth, uint8_t* out) {
  for (int half = 0; half < 2; ++half)
    for (size_t c = 0; c < depth; c += S::W) {
      typename S::I r[S::L];
      for (size_t i = 0; i < S::L; ++i) {
        const size_t n = smaller(row + static_cast<size_t>(half) * S::L + i, w.n - 1);
        r[i] = codec.load(w.row(n) + (column + c) / S::W * C::kBytes);
      }
      S::transpose(r);
      for (size_t i = 0; i < S::L; ++i) S::store(out + ((c / 4 + i) * 2 + static_cast<size_t>(half)) * 4 * S::L, r[i]);
    }
}

// Scales of a tile's rows for one chunk, then scale * zero.
template <class S>
void tile_scales(const Weight& w, size_t row, size_t chunk, float* out) {
  for (size_t i = 0; i < 2 * S::L; ++i) {
    const size_t at = smaller(row + i, w.n - 1) * w.groups + (w.group ? chunk : 0);
    const float s = param(w.scale, at, w.bf16);
    out[i] = s * w.unit;
    out[2 * S::L + i] = w.zero ? s * param(w.zero, at, w.bf16) : 0.0f;
  }
}

// One block of activations times one tile, `chunks` chunks deep, added to c (kGemmRows x 2L).
template <class S, bool Wide>
void gemm_block(const Weight& w, const Gemm& g, size_t depth, const int8_t* x, const int32_t* start, const float* sums,
                const uint8_t* tile, const float* scales, float* c) {
  using I = typename S::I;
  using F = typename S::F;
  constexpr int R = S::kGemmRows;
  for (size_t done = 0; done < depth; done += g.chunk) {
    const size_t words = smaller(g.chunk, depth - done) / 4;
    I acc[R][2];
    repeat<R>([&](auto r) BITFOLD_INLINE { acc[r.value][0] = acc[r.value][1] = S::broadcast4(start + r.value); });
    for (size_t i = 0; i < words; ++i) {
      const I a = S::load(tile), b = S::load(tile + 4 * S::L);
      repeat<R>([&](auto r) BITFOLD_INLINE {
        const I xr = S::broadcast4(x + 4 * r.value);
        acc[r.value][0] = S::template dot<Wide ? 8 : 4>(acc[r.value][0], a, xr);
        acc[r.value][1] = S::template dot<Wide ? 8 : 4>(acc[r.value][1], b, xr);
      });
      tile += 8 * S::L;
      x += 4 * R;
    }
    const F s0 = S::loadf(scales), s1 = S::loadf(scales + S::L);
    repeat<R>([&](auto r) BITFOLD_INLINE {
      float* to = c + r.value * 2 * S::L;
      F f0 = S::fma(S::to_float(acc[r.value][0]), s0, S::loadf(to));
      F f1 = S::fma(S::to_float(acc[r.value][1]), s1, S::loadf(to + S::L));
      if (w.zero) {
        const F sum = S::set(-sums[r.value]);
        f0 = S::fma(sum, S::loadf(scales + 2 * S::L), f0);
        f1 = S::fma(sum, S::loadf(scales + 3 * S::L), f1);
      }
      S::storef(to, f0);
      S::storef(to + S::L, f1);
    });
    start += R;
    sums += w.zero ? R : 0;
    scales += 4 * S::L;
  }
}

template <class S>
size_t gemm_scratch(const Weight& w, const Act8& a) {
  const Gemm g = Gemm::plan<S>(w, a.m, a.padded);
  const size_t tile = 2 * S::L, chunks = g.depth / g.chunk;
  return kTiles * tile * (g.depth + sizeof(float) * (2 * chunks + g.blocks * S::kGemmRows));
}

template <class S>
void write_panel(const Weight& w, const Act8& a, size_t row, size_t tiles, const float* c, float* y) {
  constexpr size_t R = S::kGemmRows, N = 2 * S::L;
  for (size_t m = 0; m < a.m; ++m)
    for (size_t t = 0; t < tiles; ++t) {
      const float* from = c + ((m / R * kTiles + t) * R + m % R) * N;
      const size_t n = row + t * N, stop = smaller(w.n - n, N);
      for (size_t i = 0; i < stop; ++i) y[m * w.n + n + i] = from[i] * a.scale[m];
    }
}

// Decodes a panel at a time, whatever the codec.
template <class S, class C>
struct Panel {
  static void decode(const Weight& w, const Gemm& g, size_t row, size_t tiles, size_t column, size_t depth,
                     uint8_t* out) {
    const C codec(w);
    for (size_t t = 0; t < tiles; ++t)
      decode_tile<S>(w, codec, row + t * 2 * S::L, column, depth, out + t * 2 * S::L * g.depth);
  }
};

using DecodePanel = void (*)(const Weight&, const Gemm&, size_t, size_t, size_t, size_t, uint8_t*);

template <class S, bool Wide>
void gemm(const Weight& w, const Act8& a, size_t begin, size_t end, float* y, void* scratch, DecodePanel decode) {
  constexpr size_t R = S::kGemmRows, N = 2 * S::L;
  const Gemm g = Gemm::plan<S>(w, a.m, a.padded);
  uint8_t* panel = static_cast<uint8_t*>(scratch);
  float* scales = reinterpret_cast<float*>(panel + kTiles * N * g.depth);
  float* c = scales + kTiles * 2 * N * (g.depth / g.chunk);
  for (size_t row = begin; row < end; row += kTiles * N) {
    const size_t tiles = smaller(kTiles, (end - row + N - 1) / N);
    memset(c, 0, sizeof(float) * g.blocks * kTiles * R * N);
    for (size_t k = 0; k < a.padded; k += g.depth) {
      const size_t depth = smaller(g.depth, a.padded - k), first = k / g.chunk;
      decode(w, g, row, tiles, k, depth, panel);
      for (size_t t = 0; t < tiles; ++t)
        for (size_t i = 0; i * g.chunk < depth; ++i)
          tile_scales<S>(w, row + t * N, first + i, scales + (t * (g.depth / g.chunk) + i) * 2 * N);
      for (size_t b = 0; b < g.blocks; ++b)
        for (size_t t = 0; t < tiles; ++t)
          gemm_block<S, Wide>(w, g, depth, a.x + (b * a.padded + k) * R, a.start + (b * g.chunks + first) * R,
                              w.zero ? a.sums + (b * g.chunks + first) * R : nullptr, panel + t * N * g.depth,
                              scales + t * (g.depth / g.chunk) * 2 * N, c + (b * kTiles + t) * R * N);
    }
    write_panel<S>(w, a, row, tiles, c, y);
  }
}

template <class S>
struct Gemm8 {
  template <int B>
  static void run(const Weight& w, const Act8& a, size_t begin, size_t end, float* y, void* const& scratch) {
    if constexpr (B == 1 || B == 4) {
      if (w.has_lut) return gemm<S, false>(w, a, begin, end, y, scratch, Panel<S, DenseLut<S, B>>::decode);
    }
    gemm<S, B == 8>(w, a, begin, end, y, scratch, Panel<S, Dense<S, B>>::decode);
  }
};

}  // namespace BITFOLD_NS
}  // namespace bitfold
