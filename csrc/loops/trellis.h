// The loops over trellis tiles (docs/trellis.md): 32 rows x 4 columns, which decode to 32 / S::L vectors of S::L rows,
// the 4 columns of a row together. The tiles of 32 rows lie one after the other: the weight is read as a stream.
//
// Values are bytes with 128 added, as dot() wants them. A tile of random bytes is a valid tile: whatever a damaged file
// holds, the loops compute with it and read nothing else.
#pragma once
#include "loops/gemm.h"

namespace bitfold {
namespace BITFOLD_NS {

constexpr size_t kBand = 32;     // rows of a tile
constexpr size_t kAhead = 4096;  // bytes that are fetched ahead

template <class S>
struct TrellisGemv8 {
  template <int K>
  static void run(const TrellisWeight& w, const Act8& a, size_t begin, size_t end, float* y) {
    using I = typename S::I;
    constexpr int V = kBand / S::L;
    const TileCode code = tile_code(w.code, 128);
    int32_t start = 0;
    for (int i = 0; i < S::L; ++i) start += a.start[i];
    for (size_t row = begin; row < end; row += kBand) {
      const uint8_t* tile = w.tiles + row / kBand * w.band_bytes;
      I acc[V];
      repeat<V>([&](auto v) BITFOLD_INLINE { acc[v.value] = S::broadcast4(&start); });
      for (size_t c = 0; c < w.k; c += 4, tile += 16 * K) {
        S::prefetch(tile + kAhead);
        I values[V];
        Tile<K>::decode(code, tile, values);
        const I x = S::broadcast4(a.x + c);
        repeat<V>([&](auto v) BITFOLD_INLINE { acc[v.value] = S::template dot<8>(acc[v.value], values[v.value], x); });
      }
      float out[kBand];
      repeat<V>([&](auto v) BITFOLD_INLINE { S::storef(out + v.value * S::L, S::to_float(acc[v.value])); });
      for (size_t i = row; i < smaller(row + kBand, end); ++i) y[i] = out[i - row] * param(w.scale, i, true) * *a.scale;
    }
  }
};

template <class S>
struct TrellisGemvF {
  template <int K>
  static void run(const TrellisWeight& w, const ActF& a, size_t begin, size_t end, float* y) {
    using I = typename S::I;
    using F = typename S::F;
    constexpr int V = kBand / S::L;
    const TileCode code = tile_code(w.code, 0);
    for (size_t row = begin; row < end; row += kBand) {
      const uint8_t* tile = w.tiles + row / kBand * w.band_bytes;
      F acc[V];
      repeat<V>([&](auto v) BITFOLD_INLINE { acc[v.value] = S::zerof(); });
      for (size_t c = 0; c < w.k; c += 4, tile += 16 * K) {
        S::prefetch(tile + kAhead);
        I values[V];
        Tile<K>::decode(code, tile, values);
        repeat<4>([&](auto j) BITFOLD_INLINE {
          const F x = S::set(a.x[c + j.value]);
          repeat<V>([&](auto v) BITFOLD_INLINE {
            acc[v.value] = S::fma(S::template plane<j.value>(values[v.value]), x, acc[v.value]);
          });
        });
      }
      float out[kBand];
      repeat<V>([&](auto v) BITFOLD_INLINE { S::storef(out + v.value * S::L, acc[v.value]); });
      for (size_t i = row; i < smaller(row + kBand, end); ++i) y[i] = out[i - row] * param(w.scale, i, true);
    }
  }
};

// A panel, see panel.h. Columns behind the last tile are zero.
template <class S, int K>
void trellis_panel(const TileCode& code, const TrellisWeight& w, size_t row, size_t tiles, size_t column, size_t depth,
                   size_t stride, uint8_t* out) {
  constexpr int V = kBand / S::L;
  constexpr size_t kPer = V / 2;  // tiles of a panel in a band
  for (size_t t = 0; t < tiles; t += kPer) {
    const uint8_t* tile = w.tiles + (row + t * 2 * S::L) / kBand * w.band_bytes + column / 4 * 16 * K;
    for (size_t c = 0; c < depth; c += 4, tile += 16 * K) {
      typename S::I values[V];
      S::prefetch(tile + kAhead);
      if (column + c < w.k) {
        Tile<K>::decode(code, tile, values);
      } else {
        repeat<V>([&](auto v) BITFOLD_INLINE { values[v.value] = S::zero(); });
      }
      repeat<V>([&](auto v) BITFOLD_INLINE {
        if (t + v.value / 2 < tiles)
          S::store(out + (t + v.value / 2) * stride + (c / 4 * 2 + v.value % 2) * 4 * S::L, values[v.value]);
      });
    }
  }
}

// Rows [begin, end) as float32: bands are decoded some columns at a time and transposed.
template <class S>
struct TrellisDequantize {
  template <int K>
  static void run(const TrellisWeight& w, size_t begin, size_t end, float* out) {
    constexpr size_t V = kBand / S::L, kColumns = 4 * S::L;
    const TileCode code = tile_code(w.code, 0);
    for (size_t band = begin / kBand; band * kBand < end; ++band)
      for (size_t c = 0; c < w.k; c += kColumns) {
        const uint8_t* tile = w.tiles + band * w.band_bytes + c / 4 * 16 * K;
        typename S::I values[V][S::L];
        for (size_t i = 0; i < S::L && c + 4 * i < w.k; ++i) {
          typename S::I v[V];
          Tile<K>::decode(code, tile + i * 16 * K, v);
          for (size_t j = 0; j < V; ++j) values[j][i] = v[j];
        }
        for (size_t i = (smaller(w.k - c, kColumns) + 3) / 4; i < S::L; ++i)
          for (size_t j = 0; j < V; ++j) values[j][i] = S::zero();
        for (size_t j = 0; j < V; ++j) S::transpose(values[j]);
        for (size_t r = 0; r < kBand; ++r) {
          const size_t n = band * kBand + r;
          if (n < begin || n >= end) continue;
          int8_t row[kColumns];
          S::store(row, values[r / S::L][r % S::L]);
          const float s = param(w.scale, n, true);
          float* to = out + (n - begin) * w.k + c;
          const size_t count = smaller(w.k - c, kColumns);
          for (size_t i = 0; i < count; ++i) to[i] = static_cast<float>(row[i]) * s;
        }
      }
  }
};

// From the bits of a trellis to a template argument: f is a class with static members run<K>.
template <class F, class... A>
inline auto with_trellis_bits(int bits, const A&... a) {
  switch (bits) {
    case 1:
      return F::template run<1>(a...);
    case 2:
      return F::template run<2>(a...);
    case 3:
      return F::template run<3>(a...);
    default:
      return F::template run<4>(a...);
  }
}

template <class S>
class Panels<S, TrellisWeight> {
 public:
  explicit Panels(const TrellisWeight& w) : code_(tile_code(w.code, 128)) {
    with_trellis_bits<Choose>(w.code.bits, &fill_);
  }

  void operator()(const TrellisWeight& w, size_t row, size_t tiles, size_t column, size_t depth, size_t stride,
                  uint8_t* out) const {
    fill_(code_, w, row, tiles, column, depth, stride, out);
  }

 private:
  using Fill = void (*)(const TileCode&, const TrellisWeight&, size_t, size_t, size_t, size_t, size_t, uint8_t*);
  struct Choose {
    template <int K>
    static void run(Fill* fill) {
      *fill = trellis_panel<S, K>;
    }
  };
  TileCode code_;
  Fill fill_ = nullptr;
};

// Several rows of activations, in bytes.
template <class S>
void gemm_bytes(const TrellisWeight& w, const Act8& a, size_t begin, size_t end, float* y, void* scratch) {
  gemm_with<S, ByteProducts<S, true>>(w, a, begin, end, y, scratch);
}

}  // namespace BITFOLD_NS
}  // namespace bitfold
