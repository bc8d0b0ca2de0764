// Attention of a prompt on the tile registers of AMX: many queries look at the cache together.
//
// As in amx_floats.h, a float is a sum of bfloat16. What the cache holds has two parts exactly (16 bits, or a whole
// number times a bfloat16 scale), or one (bfloat16); queries and probabilities have three. Of the products of parts
// those below 2^-24 of the whole are left out. Sums are float32.
#pragma once
#include "loops/amx_floats.h"
#include "loops/engine.h"

namespace bitfold {
namespace BITFOLD_NS {

constexpr size_t kAttendRows = 64;  // queries that share what is made of the cache; a multiple of kTileRows
constexpr size_t kTileRows = 16;
constexpr size_t kQueryParts = 3;

template <class S, class T>
class TileAttention {
 public:
  static bool fits(const Attend& a) { return a.rows >= kTileRows && a.rows <= kAttendRows && a.dim % kTileDepth == 0; }

  static size_t scratch(size_t dim) {
    return kQueryParts * kAttendRows * dim * 2 + 2 * kPiece * dim * 2 + kAttendRows * dim * sizeof(float) +
           kQueryParts * kAttendRows * kPiece * 2;
  }

  explicit TileAttention(const Attend& attend) : a_(attend), parts_(a_.kind == CacheKind::kBf16 ? 1 : 2) {
    blocks_ = (a_.rows + kTileRows - 1) / kTileRows;
    queries_ = static_cast<uint8_t*>(a_.tiles);
    cached_ = queries_ + kQueryParts * kAttendRows * a_.dim * 2;
    weights_ = cached_ + 2 * kPiece * a_.dim * 2;
    a_.out = reinterpret_cast<float*>(weights_ + kQueryParts * kAttendRows * kPiece * 2);
  }

  void run(float* out) {
    T::configure(64);
    split_queries();
    for (size_t r = 0; r < a_.rows; ++r) {
      a_.max[r] = kUnseen;
      a_.sum[r] = 0;
    }
    memset(a_.out, 0, blocks_ * kTileRows * a_.dim * sizeof(float));
    for (size_t first = a_.begin; first < a_.end; first += kPiece) piece(first);
    T::release();
    memcpy(out, a_.out, a_.rows * a_.dim * sizeof(float));
  }

 private:
  void piece(size_t first) {
    const size_t at = first % a_.positions;
    // Keys of kKeyBlock positions are together, values of one position.
    fill(a_.keys, at, kKeyBlock, unpack_keys);
    bool any[kAttendRows / kTileRows] = {}, all = false;
    for (size_t b = 0; b < blocks_; ++b)
      if (seen(b, first)) scores(b);
    for (size_t b = 0; b < blocks_; ++b) {
      if (!seen(b, first)) continue;
      for (size_t r = b * kTileRows; r < smaller(a_.rows, (b + 1) * kTileRows); ++r) any[b] |= soften<S>(a_, r, first);
      if (any[b]) split_weights(b);
      all |= any[b];
    }
    if (!all) return;
    fill(a_.values, at, a_.dim, unpack_values);
    for (size_t b = 0; b < blocks_; ++b)
      if (any[b]) weigh(b);
  }

  bool seen(size_t b, size_t first) const {
    const size_t last = smaller(a_.rows, (b + 1) * kTileRows) - 1;
    return a_.to[last] > first && a_.from[b * kTileRows] < first + kPiece;
  }

  // Tiles of kTileDepth columns of a block of rows, part after part; rows behind the last are zeros.
  void split_queries() {
    const float zeros[kTileDepth] = {};
    for (size_t r = 0; r < blocks_ * kTileRows; ++r)
      for (size_t d = 0; d < a_.dim; d += kTileDepth)
        split_row(r < a_.rows ? a_.q + r * a_.q_stride + d : zeros,
                  queries_ + (r / kTileRows * (a_.dim / kTileDepth) + d / kTileDepth) * kQueryParts * kTile +
                      r % kTileRows * 64);
  }

  static void split_row(const float* x, uint8_t* out) {
    typename S::I parts[kQueryParts];
    split<S>(x, parts);
    for (size_t p = 0; p < kQueryParts; ++p) S::store(out + p * kTile, parts[p]);
  }

  // A piece of the cache, rows of `width` numbers -> tiles of kTileRows pairs of rows by kTileRows columns.
  void fill(const void* cached, size_t at, size_t width, void (*unpack)(const Attend&, size_t, float*)) {
    if (a_.kind == CacheKind::kF16) return pair<2>(static_cast<const Half*>(cached) + at * a_.dim, width);
    if (a_.kind == CacheKind::kBf16) return pair<1>(static_cast<const Brain*>(cached) + at * a_.dim, width);
    unpack(a_, at, a_.unpacked);
    pair<2>(static_cast<const float*>(a_.unpacked), width);
  }

  template <int Parts, class N>
  void pair(const N* from, size_t width) {
    uint8_t* to = cached_;
    for (size_t row = 0; row < kPiece * a_.dim / width; row += 2 * kTileRows)
      for (size_t column = 0; column < width; column += kTileRows, to += Parts * kTile)
        for (size_t i = 0; i < kTileRows; ++i) {
          const N* two = from + (row + 2 * i) * width + column;
          typename S::F a = load_cached<S>(two), b = load_cached<S>(two + width);
          repeat<Parts>([&](auto p) BITFOLD_INLINE {
            const typename S::F near_a = S::near_half(a), near_b = S::near_half(b);
            S::store(to + p.value * kTile + i * 64, S::pair_halves(near_a, near_b));
            a = S::sub(a, near_a);
            b = S::sub(b, near_b);
          });
        }
  }

  // Scores of block b: sums 0..3 are kTileRows positions each.
  void scores(size_t b) {
    const size_t depths = a_.dim / kTileDepth, step = parts_ * kTile;
    zero();
    for (size_t d = 0; d < depths; ++d)
      products(queries_ + (b * depths + d) * kQueryParts * kTile, cached_ + d * step, depths * step);
    store(a_.scratch + b * kTileRows * kPiece, kPiece * sizeof(float));
  }

  // Probabilities of block b -> tiles. What is stored can be loaded into a tile some time later only.
  void split_weights(size_t b) {
    for (size_t r = 0; r < kTileRows; ++r)
      for (size_t j = 0; j < kPiece; j += kTileDepth)
        split_row(a_.scratch + (b * kTileRows + r) * kPiece + j, weights(b, j / kTileDepth) + r * 64);
  }
  uint8_t* weights(size_t b, size_t j) const { return weights_ + (b * kPiece / kTileDepth + j) * kQueryParts * kTile; }

  // Of block b: out += probabilities times values, 4 tiles of columns at a time.
  void weigh(size_t b) {
    const size_t columns = a_.dim / kTileRows, step = parts_ * kTile;
    for (size_t c = 0; c < columns; c += 4) {
      float* out = a_.out + b * kTileRows * a_.dim + c * kTileRows;
      const size_t wide = smaller(4, columns - c);
      load(out, a_.dim * sizeof(float), wide);
      for (size_t j = 0; j < kPiece / kTileDepth; ++j)
        products(weights(b, j), cached_ + (j * columns + c) * step, step, wide);
      store(out, a_.dim * sizeof(float), wide);
    }
  }

  // Sums 0..wide-1 += the parts of x times those of tiles `step` bytes apart. No product waits for the one before.
  void products(const uint8_t* x, const uint8_t* tiles, size_t step, size_t wide = 4) const {
    for (size_t p = 0; p < kQueryParts; ++p) {
      T::template load<4>(x + p * kTile, 64);
      for (size_t c = 0; c < parts_ && p + c < kQueryParts; ++c)
        each(wide, [&](auto n) BITFOLD_INLINE {
          constexpr int kFrom = 6 + n.value % 2;
          T::template load<kFrom>(tiles + c * kTile + n.value * step, 64);
          T::template dot_bf16<n.value, 4, kFrom>();
        });
    }
  }

  template <class F>
  static BITFOLD_INLINE void each(size_t wide, const F& f) {
    repeat<4>([&](auto n) BITFOLD_INLINE {
      if (n.value < wide) f(n);
    });
  }
  static void zero() {
    each(4, [](auto n) BITFOLD_INLINE { T::template zero<n.value>(); });
  }
  static void load(const float* from, size_t stride, size_t wide) {
    each(wide, [&](auto n) BITFOLD_INLINE { T::template load<n.value>(from + n.value * kTileRows, stride); });
  }
  static void store(float* to, size_t stride, size_t wide = 4) {
    each(wide, [&](auto n) BITFOLD_INLINE { T::template store<n.value>(to + n.value * kTileRows, stride); });
  }

  Attend a_;
  const size_t parts_;  // of what the cache holds
  size_t blocks_;       // of kTileRows queries
  uint8_t *queries_, *cached_, *weights_;
};

template <class S, class T>
void tile_attend(const Attend& a) {
  if (!TileAttention<S, T>::fits(a)) return attend<S>(a);
  TileAttention<S, T>(a).run(a.out);
}

}  // namespace BITFOLD_NS
}  // namespace bitfold
