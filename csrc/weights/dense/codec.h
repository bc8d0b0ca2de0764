// Codecs: bytes of the canonical layout -> a vector of S::W codes, column after column.
//
// A codec is a struct with a constructor from the weight and `load(p)`, which reads exactly `kBytes` bytes at p and is
// `map` of the codes there. The
// integer loops want unsigned bytes u with value = (u - offset) * unit; the float loops want float values.
#pragma once
#include "simd/swar.h"
#include "system/table.h"

namespace bitfold {
namespace BITFOLD_NS {

// B-bit codes, least significant bits first.
template <class S, int B>
struct Dense {
  static constexpr int kBits = B;
  static constexpr size_t kBytes = size_t{S::W} * B / 8;
  explicit Dense(const DenseWeight&) {}
  typename S::I load(const uint8_t* p) const { return S::template codes<B>(p); }
  typename S::I map(typename S::I codes) const { return codes; }
};

// The same through a table of at most 16 small integers (1-bit signs, FP4).
template <class S, int B>
struct DenseLut {
  static constexpr int kBits = B;
  static constexpr size_t kBytes = size_t{S::W} * B / 8;
  typename S::I table;
  explicit DenseLut(const DenseWeight& w) : table(S::table16(w.lut)) {}
  typename S::I load(const uint8_t* p) const { return map(S::template codes<B>(p)); }
  typename S::I map(typename S::I codes) const { return S::lookup(table, codes); }
};

// A step as four vectors of float: lane i of the j-th belongs to column 4i + j.
template <class S, int B, bool Table>
struct Values;

template <class S, int B>
struct Values<S, B, true> {
  typename S::Table table;
  explicit Values(const DenseWeight& w) : table(S::table(w.points)) {}
  template <int J>
  typename S::F get(typename S::I codes) const {
    return S::template entry<J>(table, codes);
  }
  typename S::I prepare(typename S::I codes) const { return codes; }
};

template <class S, int B>
struct Values<S, B, false> {
  typename S::I offset;
  explicit Values(const Scaled& w) : offset(S::set8(static_cast<int8_t>(w.offset))) {}
  template <int J>
  typename S::F get(typename S::I centred) const {
    return S::template plane<J>(centred);
  }
  typename S::I prepare(typename S::I codes) const { return S::sub8(codes, offset); }
};

}  // namespace BITFOLD_NS
}  // namespace bitfold
