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

// Fetches the packed bytes of the next panel, some lines at a time, while products are made: a burst of requests would
// stall. Lines are taken row by row, then the next 64 bytes of every row.
struct Fetch {
  const uint8_t* at;
  size_t stride = 64, rows = ~size_t{0};  // bytes from row to row, rows that are read side by side
  size_t row = 0, left, step;             // lines that are left, and those of one call
  size_t every = 1, waited = 0;           // calls from one that fetches to the next

  // `depth` columns of `count` rows, from `first` and `column` on; `steps`: how often `some` will be called, at least.
  Fetch(const DenseWeight& w, size_t first, size_t count, size_t column, size_t depth, size_t steps)
      : at(w.codes + first * w.row_bytes + column / 8 * static_cast<size_t>(w.bits)), stride(w.row_bytes), rows(count) {
    left = count * ((depth / 8 * static_cast<size_t>(w.bits) + 63) / 64);
    share(steps);
  }

  // Of the first 32 rows: the others are fetched by decoding itself.
  Fetch(const TrellisWeight& w, size_t first, size_t, size_t column, size_t depth, size_t steps) {
    const size_t bits = static_cast<size_t>(w.code.bits);
    at = w.tiles + first / 32 * w.band_bytes + column * 4 * bits;
    left = depth * 4 * bits / 64;
    share(steps);
  }

  void share(size_t steps) {
    step = (left + steps - 1) / steps;
    every = left && steps / left > 1 ? steps / left : 1;
  }

  template <class S>
  BITFOLD_INLINE void some() {
    if (++waited < every) return;
    waited = 0;
    size_t now = smaller(step, left);
    left -= now;
    for (; now != 0; --now) {
      S::prefetch_far(at);
      at += stride;
      if (++row == rows) {
        row = 0;
        at += 64 - rows * stride;
      }
    }
  }
};

// Rows are copied before parts of cache lines are read: where rows are a power of two apart, the same columns of many
// rows compete for a few lines of the first-level cache. Rows behind the last repeat it.
template <class S, class C, int V>
struct Stage {
  static constexpr size_t kRow = kPanelDepth * C::kBytes / S::W + 2 * 4 * S::L;  // a row, and slack
  alignas(64) uint8_t bytes[V * S::L * kRow];

  // `depth` columns, from `column` on, of V * S::L rows.
  void copy(const DenseWeight& w, size_t row, size_t column, size_t depth) {
    const size_t at = column / S::W * C::kBytes, count = depth / S::W * C::kBytes;
    for (size_t i = 0; i < V * S::L; ++i) {
      const uint8_t* from = w.row(smaller(row + i, w.n - 1)) + at;
      uint8_t* to = bytes + i * kRow;
      for (size_t c = 0; c < count; c += 4 * S::L) S::store(to + c, S::load(from + c));
    }
  }

  // f(i, vectors) for the i-th 4 columns from `column` of what was copied, `depth` of them; between() every few calls.
  template <class F, class Between>
  BITFOLD_INLINE void each_quad(const C& codec, size_t column, size_t depth, const F& f, const Between& between) const {
    using Quads = typename S::template Quads<C::kBits>;
    const uint8_t* at = bytes + column / 8 * C::kBits;
    for (size_t c = 0; c < depth; c += Quads::kColumns, at += Quads::kBytes) {
      Quads::template run<V>(at, kRow, [&](size_t i, typename S::I(&v)[V]) BITFOLD_INLINE {
        repeat<V>([&](auto j) BITFOLD_INLINE { v[j.value] = codec.map(v[j.value]); });
        f(c / 4 + i, v);
      });
      between();
    }
  }
};

// S::L rows of the weight, unpacked and then transposed: into every second vector of a tile.
template <class S, class C>
void decode_rows(const DenseWeight& w, const C& codec, size_t row, size_t column, size_t depth, uint8_t* out) {
  const uint8_t* rows[S::L];
  for (size_t i = 0; i < S::L; ++i) rows[i] = w.row(smaller(row + i, w.n - 1)) + column / S::W * C::kBytes;
  for (size_t c = 0, at = 0; c < depth; c += S::W, at += C::kBytes) {
    typename S::I r[S::L];
    for (size_t i = 0; i < S::L; ++i) r[i] = codec.load(rows[i] + at);
    S::transpose(r);
    for (size_t i = 0; i < S::L; ++i) S::store(out + (c / 4 + i) * 8 * S::L, r[i]);
  }
}

template <class S, class C>
void decode_panel(const DenseWeight& w, size_t row, size_t tiles, size_t column, size_t depth, size_t stride,
                  uint8_t* out) {
  const C codec(w);
  for (size_t h = 0; h < 2 * tiles; ++h) {
    uint8_t* to = out + h / 2 * stride + h % 2 * 4 * S::L;
    if constexpr (S::template Quads<C::kBits>::kBetter) {
      Stage<S, C, 1> stage;
      stage.copy(w, row + h * S::L, column, depth);
      stage.each_quad(
          codec, 0, depth, [&](size_t i, typename S::I(&v)[1]) BITFOLD_INLINE { S::store(to + i * 8 * S::L, v[0]); },
          [] {});
    } else {
      decode_rows<S>(w, codec, row + h * S::L, column, depth, to);
    }
  }
}

// How a kind of weight is decoded into panels; chosen once for each call of gemm.
template <class S, class W>
class Panels;

template <class S>
class Panels<S, DenseWeight> {
 public:
  explicit Panels(const DenseWeight& w) { with_bits<Choose>(w.bits, w, &fill_); }

  // The first `tiles` tiles of the panel at `row` and `column`.
  void operator()(const DenseWeight& w, size_t row, size_t tiles, size_t column, size_t depth, size_t stride,
                  uint8_t* out) const {
    fill_(w, row, tiles, column, depth, stride, out);
  }

 private:
  using Fill = void (*)(const DenseWeight&, size_t, size_t, size_t, size_t, size_t, uint8_t*);
  struct Choose {
    template <int B>
    static void run(const DenseWeight& w, Fill* fill) {
      *fill = decode_panel<S, Dense<S, B>>;
      if constexpr (B == 1 || B == 4) {
        if (w.has_lut) *fill = decode_panel<S, DenseLut<S, B>>;
      }
    }
  };
  Fill fill_ = nullptr;
};

}  // namespace BITFOLD_NS
}  // namespace bitfold
