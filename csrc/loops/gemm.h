// Several rows of activations: a panel of the weight is decoded into the cache and used for all of them.
//
// Activations lie in blocks of R rows, one column (S::kGemmColumns if they are bytes) of each row in turn. Products are
// summed over a chunk of columns that share scales, then scaled into float accumulators that stay in the cache.
#pragma once
#include "loops/panel.h"

namespace bitfold {
namespace BITFOLD_NS {

// Rows of activations in a block: as many as the registers hold, fewer where that saves multiplying zeros.
template <class S>
size_t block_rows(size_t m) {
  constexpr size_t most = S::kGemmRows;
  if (most == 4 || m <= 4) return 4;
  const bool saves = m < 64 && (m + 7) / 8 * 8 < (m + most - 1) / most * most;
  return most == 8 || saves ? 8 : most;
}

constexpr size_t kFewRows = 16, kShallow = 512;

struct Plan {
  size_t chunk;   // columns that share scales
  size_t chunks;  // in a row
  size_t depth;   // columns of a panel: whole chunks
  size_t blocks;  // of activation rows
  size_t tiles;   // of a panel; it should fit the first-level cache if few rows use it, else the second-level one
  size_t stride;  // bytes of a tile

  template <class S>
  static Plan of(const Scaled& w, size_t m, size_t padded, size_t rows) {
    Plan g;
    const size_t depth = m <= kFewRows ? kShallow : kPanelDepth;
    g.tiles = m <= kFewRows ? 32 / (2 * S::L) : kTiles;
    g.chunk = w.group ? w.group : depth;
    while (g.chunk > depth) g.chunk = g.chunk % 128 ? 64 : g.chunk / 2;
    g.chunks = (padded + g.chunk - 1) / g.chunk;
    g.depth = depth / g.chunk * g.chunk;
    g.blocks = (m + rows - 1) / rows;
    g.stride = 2 * S::L * g.depth;
    return g;
  }
};

// start, and sums if the weight has zero points, of one row of activations; null: zeros.
inline void chunk_sums(const Scaled& w, const Plan& g, const int8_t* x, size_t padded, size_t row, size_t R, int offset,
                       int32_t* start, float* sums) {
  for (size_t i = 0; i < g.chunks; ++i) {
    int32_t sum = 0;
    for (size_t c = i * g.chunk; x && c < smaller(padded, (i + 1) * g.chunk); ++c) sum += x[c];
    const size_t at = (row / R * g.chunks + i) * R + row % R;
    start[at] = -offset * sum;
    if (w.zero) sums[at] = static_cast<float>(sum);
  }
}

// Row `row` of activations, (padded) bytes or zeros if x is null -> its place in out: blocks x padded/kGemmColumns x
// rows x kGemmColumns bytes; start, sums: blocks x chunks x rows.
template <class S>
void arrange_bytes(const Scaled& w, const int8_t* x, size_t m, size_t padded, size_t row, int8_t* out, int32_t* start,
                   float* sums) {
  const size_t R = block_rows<S>(m);
  const Plan g = Plan::of<S>(w, m, padded, R);
  constexpr size_t kColumns = S::kGemmColumns;
  int8_t* to = out + row / R * padded * R + row % R * kColumns;
  for (size_t c = 0; c < padded; c += kColumns) {
    if (x) {
      memcpy(to + c * R, x + c, kColumns);
    } else {
      memset(to + c * R, 0, kColumns);
    }
  }
  chunk_sums(w, g, x, padded, row, R, w.offset - S::centre(w.bits), start, sums);
}

// x (w.k) floats or null -> out: blocks x padded x rows; sums as above.
template <class S>
void arrange_floats(const Scaled& w, const float* x, size_t m, size_t padded, size_t row, float* out, float* sums) {
  const size_t R = block_rows<S>(m);
  const Plan g = Plan::of<S>(w, m, padded, R);
  float* to = out + row / R * padded * R + row % R;
  for (size_t c = 0; c < padded; ++c) to[c * R] = x && c < w.k ? x[c] : 0.0f;
  for (size_t i = 0; w.zero && i < g.chunks; ++i) {
    double sum = 0;
    for (size_t c = i * g.chunk; x && c < smaller(w.k, (i + 1) * g.chunk); ++c) sum += x[c];
    sums[(row / R * g.chunks + i) * R + row % R] = static_cast<float>(sum);
  }
}

// Scales of a tile's rows for one chunk, then scale * zero.
template <class S>
void tile_scales(const Scaled& w, const Plan& g, size_t row, size_t chunk, float* out) {
  for (size_t i = 0; i < 2 * S::L; ++i) {
    const size_t at = smaller(row + i, w.n - 1) * w.groups + (w.group ? chunk * g.chunk / w.group : 0);
    const float s = param(w.scale, at, w.bf16);
    out[i] = s * w.unit;
    out[2 * S::L + i] = w.zero ? s * param(w.zero, at, w.bf16) : 0.0f;
  }
}

// The ways to multiply some columns of a tile by R rows of activations.
template <class S, bool Wide, size_t Columns = S::kGemmColumns>
struct ByteProducts {
  using Acc = typename S::I;
  using X = int8_t;
  static constexpr size_t kColumns = 4;
  explicit ByteProducts(const Scaled&) {}
  template <int R>
  BITFOLD_INLINE static void start(const int32_t* at, Acc (&acc)[R][2]) {
    repeat<R>([&](auto r) BITFOLD_INLINE { acc[r.value][0] = acc[r.value][1] = S::broadcast4(at + r.value); });
  }
  template <int R>
  BITFOLD_INLINE static void finish(Acc (&)[R][2]) {}
  BITFOLD_INLINE static typename S::F total(Acc acc) { return S::to_float(acc); }
  template <int R>
  BITFOLD_INLINE void step(const uint8_t* tile, const int8_t* x, Acc (&acc)[R][2]) const {
    const Acc a = S::load(tile), b = S::load(tile + 4 * S::L);
    repeat<R>([&](auto r) BITFOLD_INLINE {
      const Acc xr = S::broadcast4(x + 4 * r.value);
      acc[r.value][0] = S::template dot<Wide ? 8 : 4>(acc[r.value][0], a, xr);
      acc[r.value][1] = S::template dot<Wide ? 8 : 4>(acc[r.value][1], b, xr);
    });
  }
};

// With products of 2 x 8 by 8 x 2 matrices: until `finish`, rows 2p and 2p + 1 of acc hold four of 2 x 2 numbers, for
// two rows of activations and two rows of the tile each.
template <class S, bool Wide>
struct ByteProducts<S, Wide, 8> {
  using Acc = typename S::I;
  using X = int8_t;
  static constexpr size_t kColumns = 8;
  explicit ByteProducts(const Scaled&) {}
  template <int R>
  BITFOLD_INLINE static void start(const int32_t* at, Acc (&acc)[R][2]) {
    repeat<R / 2>([&](auto p) BITFOLD_INLINE {
      const Acc both = S::broadcast8(at + 2 * p.value);
      repeat<4>([&](auto i) BITFOLD_INLINE { acc[2 * p.value + i.value / 2][i.value % 2] = both; });
    });
  }
  template <int R>
  BITFOLD_INLINE void step(const uint8_t* tile, const int8_t* x, Acc (&acc)[R][2]) const {
    Acc w[4];
    repeat<2>([&](auto h) BITFOLD_INLINE {
      S::template zip_rows<Wide>(S::load(tile + h.value * 4 * S::L), S::load(tile + (2 + h.value) * 4 * S::L),
                                 w + 2 * h.value);
    });
    repeat<R / 2>([&](auto p) BITFOLD_INLINE {
      const Acc xp = S::load(x + 16 * p.value);
      repeat<4>([&](auto i) BITFOLD_INLINE {
        Acc& to = acc[2 * p.value + i.value / 2][i.value % 2];
        to = S::dot2x2(to, w[i.value], xp);
      });
    });
  }
  template <int R>
  BITFOLD_INLINE static void finish(Acc (&acc)[R][2]) {
    repeat<R / 2>([&](auto p) BITFOLD_INLINE {
      Acc(&a)[2] = acc[2 * p.value], (&b)[2] = acc[2 * p.value + 1];
      const Acc even0 = S::even(a[0], a[1]), even1 = S::even(b[0], b[1]);
      b[1] = S::odd(b[0], b[1]);
      b[0] = S::odd(a[0], a[1]);
      a[0] = even0;
      a[1] = even1;
    });
  }
  BITFOLD_INLINE static typename S::F total(Acc acc) { return S::to_float(acc); }
};

template <class S, bool Table>
struct FloatProducts {
  using Acc = typename S::F;
  using X = float;
  static constexpr size_t kColumns = 4;
  using V = Values<S, Table ? 4 : 8, Table>;
  V values;
  template <class W>
  explicit FloatProducts(const W& w) : values(w) {}
  template <int R>
  BITFOLD_INLINE static void start(const int32_t*, Acc (&acc)[R][2]) {
    repeat<R>([&](auto r) BITFOLD_INLINE { acc[r.value][0] = acc[r.value][1] = S::zerof(); });
  }
  template <int R>
  BITFOLD_INLINE static void finish(Acc (&)[R][2]) {}
  BITFOLD_INLINE static Acc total(Acc acc) { return acc; }
  template <int R>
  BITFOLD_INLINE void step(const uint8_t* tile, const float* x, Acc (&acc)[R][2]) const {
    const auto a = values.prepare(S::load(tile)), b = values.prepare(S::load(tile + 4 * S::L));
    repeat<4>([&](auto j) BITFOLD_INLINE {
      const Acc aj = values.template get<j.value>(a), bj = values.template get<j.value>(b);
      repeat<R>([&](auto r) BITFOLD_INLINE {
        const Acc xr = S::set(x[j.value * R + r.value]);
        acc[r.value][0] = S::fma(aj, xr, acc[r.value][0]);
        acc[r.value][1] = S::fma(bj, xr, acc[r.value][1]);
      });
    });
  }
};

// One block of activations times one tile, added to c (R x 2L); accumulators in registers.
template <class S, int R, class P>
struct RegisterBlock {
  using X = typename P::X;
  P products;
  template <class W>
  RegisterBlock(const W& w, const Plan&) : products(w) {}

  static void ready(const Scaled&, const Plan&, size_t, size_t, size_t, size_t, uint8_t*) {}  // panels are as they are

  void operator()(const Scaled& w, const Plan& g, size_t, size_t depth, const X* x, const int32_t* start,
                  const float* sums, const uint8_t* tile, const float* scales, float* c, Fetch& fetch) const {
    using F = typename S::F;
    for (size_t done = 0; done < depth; done += g.chunk) {
      typename P::Acc acc[R][2];
      P::template start<R>(start, acc);
      constexpr size_t kColumns = P::kColumns;
      for (size_t i = smaller(g.chunk, depth - done) / kColumns; i > 0; --i, tile += 2 * kColumns * S::L) {
        products.template step<R>(tile, x, acc);
        x += kColumns * R;
        for (size_t j = 0; j < kColumns; j += 4) fetch.some<S>();
      }
      P::template finish<R>(acc);
      const F s0 = S::loadf(scales), s1 = S::loadf(scales + S::L);
      repeat<R>([&](auto r) BITFOLD_INLINE {
        float* to = c + r.value * 2 * S::L;
        F f0 = S::fma(P::total(acc[r.value][0]), s0, S::loadf(to));
        F f1 = S::fma(P::total(acc[r.value][1]), s1, S::loadf(to + S::L));
        if (w.zero) {
          const F sum = S::set(-sums[r.value]);
          f0 = S::fma(sum, S::loadf(scales + 2 * S::L), f0);
          f1 = S::fma(sum, S::loadf(scales + 3 * S::L), f1);
        }
        S::storef(to, f0);
        S::storef(to + S::L, f1);
      });
      start += start ? R : 0;
      sums += w.zero ? R : 0;
      scales += 4 * S::L;
    }
  }
};

// Bytes of scratch memory of one thread.
template <class S, size_t (*Rows)(size_t)>
size_t gemm_scratch(const Scaled& w, size_t m, size_t padded) {
  const size_t R = Rows(m);
  const Plan g = Plan::of<S>(w, m, padded, R);
  return g.tiles * (g.stride + 2 * S::L * sizeof(float) * (2 * g.depth / g.chunk + g.blocks * R));
}

// to = from * scale, or what is there and that.
inline void write_row(const float* from, float scale, size_t count, bool more, float* to) {
  if (more) {
    for (size_t j = 0; j < count; ++j) to[j] += from[j] * scale;
  } else {
    for (size_t j = 0; j < count; ++j) to[j] = from[j] * scale;
  }
}

// The rows of c that are wanted; scale: of the activations, or null.
template <class S>
void write_panel(const Scaled& w, const Plan& g, size_t m, size_t R, size_t planes, const float* scale, size_t row,
                 size_t tiles, const float* c, float* y) {
  constexpr size_t N = 2 * S::L;
  for (size_t i = 0; i < m; ++i)
    for (size_t t = 0; t < tiles; ++t) {
      const float* from = c + ((i / R * g.tiles + t) * R + i % R) * N;
      const size_t n = row + t * N, count = smaller(w.n - n, N);
      write_row(from, scale ? scale[i] : 1.0f, count, i % planes != 0, y + i / planes * w.n + n);
    }
}

template <class S, int R, class Block, class W, class Act>
void gemm(const W& w, const Act& a, size_t begin, size_t end, float* y, uint8_t* panel) {
  constexpr size_t N = 2 * S::L;
  const Plan g = Plan::of<S>(w, a.m, a.padded, R);
  const Block block(w, g);
  const Panels<S, W> decode(w);
  const size_t chunks = g.depth / g.chunk;  // of a panel
  float* scales = reinterpret_cast<float*>(panel + g.tiles * g.stride);
  float* c = scales + g.tiles * 2 * N * chunks;
  for (size_t row = begin; row < end; row += g.tiles * N) {
    const size_t tiles = smaller(g.tiles, (end - row + N - 1) / N);
    memset(c, 0, sizeof(float) * g.blocks * g.tiles * R * N);
    for (size_t k = 0; k < a.padded; k += g.depth) {
      const size_t depth = smaller(g.depth, a.padded - k), first = k / g.chunk;
      for (size_t t = 0; t < tiles; ++t)
        for (size_t i = 0; i * g.chunk < depth; ++i)
          tile_scales<S>(w, g, row + t * N, first + i, scales + (t * chunks + i) * 2 * N);
      decode(w, row, tiles, k, depth, g.stride, panel);
      Block::ready(w, g, row, tiles, k, depth, panel);
      const bool last = k + g.depth >= a.padded;
      Fetch fetch(w, last ? row + g.tiles * N : row, g.tiles * N, last ? 0 : k + g.depth, g.depth,
                  tiles * g.blocks * depth / 4);
      for (size_t t = 0; t < tiles; ++t)
        for (size_t b = 0; b < g.blocks; ++b) {
          const size_t at = (b * g.chunks + first) * R;
          block(w, g, smaller(R, a.m - b * R), depth, a.x + (b * a.padded + k) * R, a.start ? a.start + at : nullptr,
                w.zero ? a.sums + at : nullptr, panel + t * g.stride, scales + t * chunks * 2 * N,
                c + (b * g.tiles + t) * R * N, fetch);
        }
    }
    write_panel<S>(w, g, a.m, R, a.planes, a.scale, row, tiles, c, y);
  }
}

// From the number of rows to a template argument.
template <class S, class P, class W, class Act>
void gemm_with(const W& w, const Act& a, size_t begin, size_t end, float* y, void* scratch) {
  uint8_t* panel = static_cast<uint8_t*>(scratch);
  const size_t rows = block_rows<S>(a.m);
  if (rows == 4) return gemm<S, 4, RegisterBlock<S, 4, P>>(w, a, begin, end, y, panel);
  if constexpr (S::kGemmRows > 8) {
    if (rows == S::kGemmRows)
      return gemm<S, S::kGemmRows, RegisterBlock<S, S::kGemmRows, P>>(w, a, begin, end, y, panel);
  }
  if constexpr (S::kGemmRows >= 8) gemm<S, 8, RegisterBlock<S, 8, P>>(w, a, begin, end, y, panel);
}

// Several rows of activations, in bytes.
template <class S>
void gemm_bytes(const DenseWeight& w, const Act8& a, size_t begin, size_t end, float* y, void* scratch) {
  if (w.bits == 8) return gemm_with<S, ByteProducts<S, true>>(w, a, begin, end, y, scratch);
  gemm_with<S, ByteProducts<S, false>>(w, a, begin, end, y, scratch);
}

}  // namespace BITFOLD_NS
}  // namespace bitfold
