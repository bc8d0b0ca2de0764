// A few rows of activations, in bytes: the weight is decoded in registers, 4 columns of some rows at a time, and
// multiplied by all of them there.
//
// Against a panel (gemm.h) this saves writing the decoded weight and reading it again, which for so few rows costs as
// much as the products. Activations are arranged as for a panel. It takes registers: one accumulator for each row of
// activations, one more for the sums over groups, and what decoding needs.
#pragma once
#include "loops/gemm.h"
#include "loops/trellis.h"

namespace bitfold {
namespace BITFOLD_NS {

constexpr size_t kMostFew = 8;

// acc[i][v] += 4 columns of the v-th L rows of the weight times row i of x.
template <class S, int B, int M, int V>
BITFOLD_INLINE inline void few_products(const typename S::I (&values)[V], const int8_t* x, typename S::I (&acc)[M][V]) {
  repeat<M>([&](auto i) BITFOLD_INLINE {
    const typename S::I xi = S::once(S::broadcast4(x + 4 * i.value));
    repeat<V>([&](auto v) BITFOLD_INLINE {
      acc[i.value][v.value] = S::template dot<B>(acc[i.value][v.value], values[v.value], xi);
    });
  });
}

// Scales or zero points of S::L rows: out[chunk * 2 * S::L + row]; one chunk if a row has a single one.
template <class S>
void params_by_lane(const Scaled& w, const Plan& g, const void* p, size_t row, float* out) {
  const size_t chunks = w.group ? g.chunks : 1;
  const auto at = [&](size_t i) { return smaller(row + i, w.n - 1) * w.groups; };
  size_t c = 0;
  for (; g.chunk == w.group && c + S::L <= chunks; c += S::L) {
    typename S::I block[S::L];
    for (size_t i = 0; i < S::L; ++i) {
      alignas(64) float one[S::L];
      S::storef(one, params<S>(p, at(i) + c, w.bf16));
      block[i] = S::load(one);
    }
    S::transpose(block);
    for (size_t i = 0; i < S::L; ++i) S::store(out + (c + i) * 2 * S::L, block[i]);
  }
  for (; c < chunks; ++c)
    for (size_t i = 0; i < S::L; ++i)
      out[c * 2 * S::L + i] = param(p, at(i) + (w.group ? c * g.chunk / w.group : 0), w.bf16);
}

// Floats for the scales, and as many for the zero points, of 2 * S::L rows.
template <class S>
size_t few_params(const Scaled& w, const Plan& g) {
  return 2 * S::L * (w.group ? g.chunks : 1);
}

// 2 * S::L rows of the weight times M rows of activations.
template <class S, class C, int M>
struct FewRows {
  static constexpr int V = 2;
  static constexpr size_t kColumns = S::template Quads<C::kBits>::kColumns;
  using I = typename S::I;
  using F = typename S::F;
  const DenseWeight& w;
  const Act8& a;
  const Plan& g;
  const C codec;
  float *scales, *zeros;
  Stage<S, C, V> stage;
  F f[M][V];
  size_t after = 0;  // index of the first scale of the next rows

  FewRows(const DenseWeight& weight, const Act8& act, const Plan& plan, float* scratch)
      : w(weight), a(act), g(plan), codec(weight), scales(scratch), zeros(scratch + few_params<S>(weight, plan)) {}

  void run(size_t row, size_t end, float* y) {
    for (size_t v = 0; v < V; ++v) {
      params_by_lane<S>(w, g, w.scale, row + v * S::L, scales + v * S::L);
      if (w.zero) params_by_lane<S>(w, g, w.zero, row + v * S::L, zeros + v * S::L);
    }
    for (auto& one : f) one[0] = one[1] = S::zerof();
    after = row + V * S::L < w.n ? (row + V * S::L) * w.groups : 0;
    for (size_t k = 0; k < a.padded; k += g.depth) {
      const size_t depth = smaller(g.depth, a.padded - k);
      const bool last = k + g.depth >= a.padded;
      Fetch fetch(w, last ? row + V * S::L : row, V * S::L, last ? 0 : k + g.depth, g.depth, depth / kColumns);
      stage.copy(w, row, k, depth);
      for (size_t done = 0; done < depth; done += g.chunk)
        chunk((k + done) / g.chunk, done, smaller(g.chunk, depth - done), a.x + (k + done) * M, fetch);
    }
    write(row, end, y);
  }

 private:
  // Columns that share scales.
  void chunk(size_t index, size_t column, size_t columns, const int8_t* x, Fetch& fetch) {
    I acc[M][V];
    repeat<M>([&](auto i)
                  BITFOLD_INLINE { acc[i.value][0] = acc[i.value][1] = S::broadcast4(a.start + index * M + i.value); });
    Fetch next = fetch;  // a copy: what f captures by reference would be written back each time
    stage.each_quad(
        codec, column, columns,
        [&](size_t quad, I(&v)[V]) BITFOLD_INLINE { few_products<S, C::kBits>(v, x + quad * 4 * M, acc); },
        [&]() BITFOLD_INLINE { next.some<S>(); });
    fetch = next;
    if (w.group) fetch_params(index);
    const size_t at = w.group ? index * V * S::L : 0;
    repeat<V>([&](auto v) BITFOLD_INLINE {
      const F s = S::loadf(scales + at + v.value * S::L), su = S::mul(s, S::set(w.unit));
      repeat<M>([&](auto i) BITFOLD_INLINE {
        f[i.value][v.value] = S::fma(S::to_float(acc[i.value][v.value]), su, f[i.value][v.value]);
      });
      if (!w.zero) return;
      const F sz = S::mul(s, S::loadf(zeros + at + v.value * S::L));
      repeat<M>([&](auto i) BITFOLD_INLINE {
        f[i.value][v.value] = S::fma(sz, S::set(-a.sums[index * M + i.value]), f[i.value][v.value]);
      });
    });
  }

  // This chunk's share of the scales and zero points of the next rows.
  void fetch_params(size_t index) const {
    const size_t size = w.bf16 ? 2 : 4, at = smaller(after + index * V * S::L, w.n * w.groups) * size;
    S::prefetch_far(static_cast<const uint8_t*>(w.scale) + at);
    if (w.zero) S::prefetch_far(static_cast<const uint8_t*>(w.zero) + at);
  }

  void write(size_t row, size_t end, float* y) const {
    for (size_t i = 0; i < a.m; ++i) {
      float out[V * S::L];
      for (size_t v = 0; v < V; ++v) S::storef(out + v * S::L, f[i][v]);
      write_row(out, a.scale[i], smaller(V * S::L, end - row), i % a.planes != 0, y + i / a.planes * w.n + row);
    }
  }
};

// False if codes cannot be decoded that way, or groups are shorter than what is decoded at a time.
template <class S>
struct FewDense {
  template <int B>
  static bool run(const DenseWeight& w, const Act8& a, size_t begin, size_t end, float* y, void* scratch) {
    using Quads = typename S::template Quads<B>;
    if constexpr (Quads::kBetter) {
      const size_t rows = block_rows<S>(a.m);
      const Plan g = Plan::of<S>(w, a.m, a.padded, rows);
      if (g.chunk % Quads::kColumns != 0) return false;
      float* params = static_cast<float*>(scratch);
      if constexpr (B == 4) {
        if (w.has_lut) return with_codec<DenseLut<S, B>>(w, a, g, rows, begin, end, y, params);
      }
      return with_codec<Dense<S, B>>(w, a, g, rows, begin, end, y, params);
    }
    return false;
  }

  template <class C>
  static bool with_codec(const DenseWeight& w, const Act8& a, const Plan& g, size_t rows, size_t begin, size_t end,
                         float* y, float* params) {
    if (rows == 4) return each<FewRows<S, C, 4>>(w, a, g, begin, end, y, params);
    return each<FewRows<S, C, 8>>(w, a, g, begin, end, y, params);
  }

  template <class R>
  static bool each(const DenseWeight& w, const Act8& a, const Plan& g, size_t begin, size_t end, float* y,
                   float* params) {
    R rows(w, a, g, params);
    for (size_t row = begin; row < end; row += 2 * S::L) rows.run(row, end, y);
    return true;
  }
};

template <class S>
struct FewTrellis {
  template <int K>
  static bool run(const TrellisWeight& w, const Act8& a, size_t begin, size_t end, float* y) {
    block_rows<S>(a.m) == 4 ? bands<K, 4>(w, a, begin, end, y) : bands<K, 8>(w, a, begin, end, y);
    return true;
  }

  template <int K, int M>
  static void bands(const TrellisWeight& w, const Act8& a, size_t begin, size_t end, float* y) {
    using I = typename S::I;
    constexpr int V = kBand / S::L;
    const TileCode code = tile_code(w.code, 128);
    const size_t chunks = Plan::of<S>(w, a.m, a.padded, M).chunks;
    int32_t start[M] = {};
    for (size_t i = 0; i < chunks * M; ++i) start[i % M] += a.start[i];
    for (size_t row = begin; row < end; row += kBand) {
      const uint8_t* tile = w.tiles + row / kBand * w.band_bytes;
      const int8_t* x = a.x;
      I acc[M][V];
      repeat<M>([&](auto i) BITFOLD_INLINE {
        repeat<V>([&](auto v) BITFOLD_INLINE { acc[i.value][v.value] = S::broadcast4(start + i.value); });
      });
      for (size_t c = 0; c < w.k; c += 4, tile += 16 * K, x += 4 * M) {
        S::prefetch(tile + kAhead);
        I values[V];
        Tile<K>::decode(code, tile, values);
        few_products<S, 8>(values, x, acc);
      }
      for (size_t i = 0; i < a.m; ++i) {
        float out[kBand];
        for (size_t v = 0; v < V; ++v) S::storef(out + v * S::L, S::to_float(acc[i][v]));
        for (size_t n = row; n < smaller(row + kBand, end); ++n) out[n - row] *= param(w.scale, n, true);
        write_row(out, a.scale[i], smaller(kBand, end - row), i % a.planes != 0, y + i / a.planes * w.n + row);
      }
    }
  }
};

// Bytes of scratch memory of one thread; 0 if it is never asked.
template <class S>
size_t few_scratch(const Scaled& w, size_t m, size_t padded) {
  if (!S::kFew || m > kMostFew) return 0;
  return 2 * few_params<S>(w, Plan::of<S>(w, m, padded, block_rows<S>(m))) * sizeof(float);
}

// False if this is a case for panels.
template <class S>
bool few8(const DenseWeight& w, const Act8& a, size_t begin, size_t end, float* y, void* scratch) {
  if constexpr (S::kFew) {
    if (a.m <= kMostFew) return with_bits<FewDense<S>>(w.bits, w, a, begin, end, y, scratch);
  }
  return false;
}

template <class S>
bool few8(const TrellisWeight& w, const Act8& a, size_t begin, size_t end, float* y, void*) {
  if constexpr (S::kFew) {
    if (a.m <= kMostFew) return with_trellis_bits<FewTrellis<S>>(w.code.bits, w, a, begin, end, y);
  }
  return false;
}

}  // namespace BITFOLD_NS
}  // namespace bitfold
