// Panels: some rows of the weight decoded once, so that many rows of activations can use them.
//
// A tile of a panel is 2 * S::L rows wide. For every 4 columns it holds two vectors, each S::L rows of 4 bytes: what
// dot products (and the tiles of AMX) want. A panel is kTiles tiles, `stride` bytes apart.
#pragma once
#include "loops/params.h"

namespace bitfold {
namespace BITFOLD_NS {

constexpr size_t kTiles = 4;
constexpr size_t kPanelDepth = 1024;  // columns of a panel at most

// Fetches the packed bytes of the next panel, line by line, while products are made: a burst of requests would stall.
struct Fetch {
  const uint8_t* base;
  size_t stride = 0;            // bytes from row to row
  unsigned mask = 0, log2 = 0;  // rows that are read side by side: a power of two
  size_t next = 0, lines, step;

  // The panel at `row` and `column`; `steps`: how often `some` will be called for it, at least.
  Fetch(const Weight& w, size_t row, size_t rows, size_t column, size_t depth, size_t steps) {
    const size_t bits = w.trellis ? static_cast<size_t>(w.trellis->bits) : static_cast<size_t>(w.bits);
    if (w.trellis) {
      base = w.codes + row / 32 * w.row_bytes + column * 4 * bits;
      lines = depth * 4 * bits / 64;  // of the first 32 rows: the others are fetched by decoding itself
    } else {
      base = w.codes + row * w.row_bytes + column / 8 * bits;
      stride = w.row_bytes;
      mask = static_cast<unsigned>(rows - 1);
      while (size_t{1} << log2 < rows) ++log2;
      lines = rows * ((depth / 8 * bits + 63) / 64);
    }
    step = (lines + steps - 1) / steps;
  }

  template <class S>
  BITFOLD_INLINE void some() {
    for (size_t i = 0; i < step && next < lines; ++i, ++next)
      S::prefetch_far(base + (next & mask) * stride + (next >> log2) * 64);
  }
};

// Rows are copied before parts of cache lines are read: where rows are a power of two apart, the same columns of many
// rows compete for a few lines of the first-level cache.
template <class S, class C>
struct Stage {
  static constexpr size_t kRow = kPanelDepth * C::kBytes / S::W + 2 * 4 * S::L;  // a row, and slack
  alignas(64) uint8_t bytes[S::L * kRow];

  const uint8_t* copy(size_t i, const uint8_t* from, size_t count) {
    uint8_t* to = bytes + i * kRow;
    for (size_t c = 0; c < count; c += 4 * S::L) S::store(to + c, S::load(from + c));
    return to;
  }
};

// L rows of the weight and `depth` columns into every second vector of a tile.
template <class S, class C>
void decode_rows(const C& codec, const uint8_t* const* rows, size_t depth, uint8_t* out) {
  using Quads = typename S::template Quads<C::kBits>;
  constexpr size_t kVector = 4 * S::L;
  if constexpr (Quads::kBetter) {
    for (size_t c = 0, at = 0; c < depth; c += Quads::kColumns, at += Quads::kBytes)
      Quads::run(rows, at, [&](size_t i, typename S::I v) BITFOLD_INLINE {
        S::store(out + (c / 4 + i) * 2 * kVector, codec.map(v));
      });
  } else {
    for (size_t c = 0, at = 0; c < depth; c += S::W, at += C::kBytes) {
      typename S::I r[S::L];
      for (size_t i = 0; i < S::L; ++i) r[i] = codec.load(rows[i] + at);
      S::transpose(r);
      for (size_t i = 0; i < S::L; ++i) S::store(out + (c / 4 + i) * 2 * kVector, r[i]);
    }
  }
}

// How a weight is decoded into panels; made once for each call of gemm.
struct Decoder {
  // The first `tiles` tiles of the panel at `row` and `column`.
  void (*panel)(const Decoder& d, const Weight& w, size_t row, size_t tiles, size_t column, size_t depth, size_t stride,
                uint8_t* out) = nullptr;
  TileCode code;  // of a trellis
};

// Rows behind the last repeat it.
template <class S, class C>
void decode_panel(const Decoder&, const Weight& w, size_t row, size_t tiles, size_t column, size_t depth, size_t stride,
                  uint8_t* out) {
  const C codec(w);
  const size_t at = column / S::W * C::kBytes, count = depth / S::W * C::kBytes;
  Stage<S, C> stage;
  for (size_t h = 0; h < 2 * tiles; ++h) {
    const uint8_t* rows[S::L];
    for (size_t i = 0; i < S::L; ++i) {
      rows[i] = w.row(smaller(row + h * S::L + i, w.n - 1)) + at;
      if constexpr (S::template Quads<C::kBits>::kBetter) rows[i] = stage.copy(i, rows[i], count);
    }
    decode_rows<S>(codec, rows, depth, out + h / 2 * stride + h % 2 * 4 * S::L);
  }
}

// The decoder of a weight with a row-major layout.
template <class S>
struct DenseDecoder {
  template <int B>
  static void run(const Weight& w, Decoder* d) {
    d->panel = decode_panel<S, Dense<S, B>>;
    if constexpr (B == 1 || B == 4) {
      if (w.has_lut) d->panel = decode_panel<S, DenseLut<S, B>>;
    }
  }
};

}  // namespace BITFOLD_NS
}  // namespace bitfold
