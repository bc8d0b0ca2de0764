// Floats on the tile registers of AMX, for weights whose numbers are no integers of one scale a row: ggml's blocks and
// unquantized bfloat16.
//
// A float is the sum of three bfloat16, each the nearest to what the ones before leave; of two to 2^-17 of itself. Of
// bfloat16 weights all three products are made. Of ggml's, which have two parts, those with more than 2^-17 of the
// whole in them: three as well. Sums are float32.
#pragma once
#include "loops/amx.h"
#include "loops/ggml.h"

namespace bitfold {
namespace BITFOLD_NS {

constexpr size_t kTileDepth = 32;  // columns of one tile product
constexpr size_t kTile = 1024;     // bytes

// 2 * S::L floats in Parts.
template <class S, int Parts>
BITFOLD_INLINE inline void split(const float* x, typename S::I (&parts)[Parts]) {
  typename S::F a = S::loadf(x), b = S::loadf(x + S::L);
  repeat<Parts>([&](auto p) BITFOLD_INLINE {
    const typename S::F near_a = S::near_half(a), near_b = S::near_half(b);
    parts[p.value] = S::high_halves(near_a, near_b);
    a = S::sub(a, near_a);
    b = S::sub(b, near_b);
  });
}

// Row i of m activations: of blocks of 32 rows, kTileDepth columns at a time, part after part.
template <class S>
struct TileActs {
  static constexpr size_t kRows = 32, kBytes = 2 * kTileDepth;  // of a row in a tile
  static constexpr int kParts = 3;
  static constexpr size_t kPart = kRows * kBytes, kChunk = kParts * kPart;

  static size_t chunks(size_t k) { return (k + kTileDepth - 1) / kTileDepth; }
  static size_t blocks(size_t m) { return (m + kRows - 1) / kRows; }
  static size_t bytes(size_t m, size_t k) { return blocks(m) * chunks(k) * kChunk; }

  static void row(const float* x, size_t k, size_t i, void* out) {
    uint8_t* to = static_cast<uint8_t*>(out) + i / kRows * chunks(k) * kChunk + i % kRows * kBytes;
    float last[kTileDepth] = {};
    for (size_t c = 0; c < chunks(k); ++c, to += kChunk) {
      const size_t at = c * kTileDepth;
      const float* from = x + at;
      if (at + kTileDepth > k) {
        memcpy(last, from, (k - at) * sizeof(float));
        from = last;
      }
      typename S::I parts[kParts];
      split<S>(from, parts);
      for (size_t p = 0; p < kParts; ++p) S::store(to + p * kPart, parts[p]);
    }
  }
};

// Rows of a weight as floats, `depth` columns from `column` on; zeros behind the last one.
template <class S, class C>
struct GgmlFloats {
  static constexpr int kParts = 2;
  const C codec{};
  void operator()(const GgmlWeight& w, size_t row, size_t column, size_t depth, float* out) const {
    const size_t there = smaller(depth, w.k - column);
    ggml_columns<S>(w, codec, row, column, there, out);
    memset(out + there, 0, (depth - there) * sizeof(float));
  }
};

template <class S>
struct PlainFloats {
  static constexpr int kParts = 1;
  void operator()(const PlainRows& w, size_t row, size_t column, size_t depth, float* out) const {
    const size_t there = smaller(depth, w.k - column), at = row * w.k + column;
    for (size_t i = 0; i < there; ++i) out[i] = param(w.w, at + i, true);
    memset(out + there, 0, (depth - there) * sizeof(float));
  }
};

// 32 rows of the weight at a time become tiles, some columns at a time; 32 rows of activations are multiplied by them.
template <class S, class T, class W, class Decode>
class TileFloats {
 public:
  static size_t scratch(size_t m) {
    return kTiles * kStride + sizeof(float) * (S::L * kDecoded + TileActs<S>::blocks(m) * kRows * kWide);
  }

  TileFloats(const W& w, const void* acts, size_t m, void* scratch)
      : w_(w), acts_(static_cast<const uint8_t*>(acts)), m_(m), panel_(static_cast<uint8_t*>(scratch)) {
    rows_ = reinterpret_cast<float*>(panel_ + kTiles * kStride);
    sums_ = rows_ + S::L * kDecoded;
  }

  void run(size_t begin, size_t end, float* y) {
    T::configure(64);
    for (size_t row = begin; row < end; row += kWide) {
      for (size_t k = 0; k < w_.k; k += kDecoded) {
        const size_t depth = round_to_tiles(smaller(kDecoded, w_.k - k));
        for (size_t h = 0; h < 2; ++h) fill(row + h * S::L, k, depth, h);
        for (size_t done = 0; done < depth; done += kInner)
          for (size_t b = 0; b < TileActs<S>::blocks(m_); ++b) block(b, k + done, done, smaller(kInner, depth - done));
      }
      for (size_t i = 0; i < m_; ++i)
        memcpy(y + i * w_.n + row, sums_ + i * kWide, smaller(kWide, end - row) * sizeof(float));
    }
    T::release();
  }

 private:
  static constexpr size_t kRows = TileActs<S>::kRows, kWide = 2 * S::L;
  static constexpr size_t kDecoded = 256;  // columns of a panel: a block of ggml's
  static constexpr size_t kInner = 128;    // of these, as many as lie in the first-level cache with their activations
  static constexpr size_t kTiles = kDecoded / kTileDepth, kStride = 4 * kTile;  // tiles of the same columns

  static size_t round_to_tiles(size_t depth) { return (depth + kTileDepth - 1) / kTileDepth * kTileDepth; }

  // S::L rows of the weight -> tiles h (and 2 + h, the second parts) of every kTileDepth columns.
  void fill(size_t row, size_t k, size_t depth, size_t h) {
    for (size_t i = 0; i < S::L; ++i) decode_(w_, smaller(row + i, w_.n - 1), k, depth, rows_ + i * kDecoded);
    for (size_t c = 0; c < depth; c += kTileDepth) {
      typename S::I parts[Decode::kParts][S::L];
      for (size_t i = 0; i < S::L; ++i) {
        typename S::I one[Decode::kParts];
        split<S>(rows_ + i * kDecoded + c, one);
        for (size_t p = 0; p < Decode::kParts; ++p) parts[p][i] = one[p];
      }
      uint8_t* to = panel_ + c / kTileDepth * kStride + h * kTile;
      for (auto& part : parts) {
        S::transpose(part);
        for (size_t i = 0; i < S::L; ++i) S::store(to + i * 64, part[i]);
        to += 2 * kTile;
      }
    }
  }

  void block(size_t b, size_t k, size_t column, size_t depth) {
    const bool both = m_ - b * kRows > 16;
    const size_t chunks = TileActs<S>::chunks(w_.k);
    const uint8_t* x = acts_ + (b * chunks + k / kTileDepth) * TileActs<S>::kChunk;
    const uint8_t* tile = panel_ + column / kTileDepth * kStride;
    float* c = sums_ + b * kRows * kWide;
    start(c, k == 0, both);
    for (size_t i = 0; i < depth; i += kTileDepth, x += TileActs<S>::kChunk, tile += kStride) {
      half<0, 1>(x, tile);
      if (both) half<2, 3>(x + 16 * 64, tile);
    }
    T::template store<0>(c, 128);
    T::template store<1>(c + 16, 128);
    if (!both) return;
    T::template store<2>(c + 16 * kWide, 128);
    T::template store<3>(c + 16 * kWide + 16, 128);
  }

  static void start(const float* c, bool first, bool both) {
    if (first) {
      T::template zero<0>();
      T::template zero<1>();
      T::template zero<2>();
      T::template zero<3>();
      return;
    }
    T::template load<0>(c, 128);
    T::template load<1>(c + 16, 128);
    if (!both) return;
    T::template load<2>(c + 16 * kWide, 128);
    T::template load<3>(c + 16 * kWide + 16, 128);
  }

  // 16 rows of activations.
  template <int A, int B>
  static void half(const uint8_t* x, const uint8_t* tile) {
    T::template load<4>(x, 64);
    T::template load<5>(tile, 64);
    T::template load<6>(tile + kTile, 64);
    T::template dot_bf16<A, 4, 5>();
    T::template dot_bf16<B, 4, 6>();
    T::template load<7>(x + TileActs<S>::kPart, 64);
    T::template dot_bf16<A, 7, 5>();
    T::template dot_bf16<B, 7, 6>();
    if (Decode::kParts == 1) {
      T::template load<4>(x + 2 * TileActs<S>::kPart, 64);
    } else {
      T::template load<5>(tile + 2 * kTile, 64);
      T::template load<6>(tile + 3 * kTile, 64);
    }
    T::template dot_bf16<A, 4, 5>();
    T::template dot_bf16<B, 4, 6>();
  }

  const W& w_;
  const uint8_t* acts_;
  const size_t m_;
  uint8_t* panel_;
  float *rows_, *sums_;
  const Decode decode_{};
};

template <class S, class T>
struct TileGgml {
  template <class C>
  static void run(const GgmlWeight& w, const void* acts, size_t m, size_t begin, size_t end, float* y, void* scratch) {
    TileFloats<S, T, GgmlWeight, GgmlFloats<S, C>>(w, acts, m, scratch).run(begin, end, y);
  }
};

template <class S, class T>
void tile_ggml(const GgmlWeight& w, const void* acts, size_t m, size_t begin, size_t end, float* y, void* scratch) {
  with_ggml<S, TileGgml<S, T>>(w.type, w, acts, m, begin, end, y, scratch);
}

template <class S, class T>
void tile_plain(const PlainRows& w, const void* acts, size_t m, size_t begin, size_t end, float* y, void* scratch) {
  TileFloats<S, T, PlainRows, PlainFloats<S>>(w, acts, m, scratch).run(begin, end, y);
}

template <class S>
size_t tile_scratch(size_t m) {
  return TileFloats<S, void, PlainRows, PlainFloats<S>>::scratch(m);
}

}  // namespace BITFOLD_NS
}  // namespace bitfold
