#include "weights/lattice/e8p.h"

#include <algorithm>

#include "system/dispatch.h"

namespace bitfold {
namespace {

constexpr size_t kBlock = 8;
constexpr size_t kBytes = 512 << 10;  // of unpacked rows at a time: they stay in the second-level cache
constexpr int kOffset = 128;

}  // namespace

void unpack_rows(const LatticeWeight& w, size_t begin, size_t end, uint8_t* out) {
  const size_t blocks = (w.k + kBlock - 1) / kBlock;
  for (size_t row = begin; row < end; ++row, out += w.k) {
    // Of the last block up to 7 bytes lie behind the row.
    table().lattice_bytes(w.codes + row * blocks * 2, w.magnitudes, blocks, out);
  }
}

DenseWeight in_bytes(const LatticeWeight& w) {
  DenseWeight out;
  out.n = out.tail_from = w.n;
  out.k = out.row_bytes = w.k;
  out.scale = w.scale;
  out.bf16 = true;
  out.offset = kOffset;
  return out;
}

size_t rows_at_a_time(const LatticeWeight& w) {
  return std::max<size_t>(64, kBytes / std::max<size_t>(1, w.k) / 64 * 64);
}

}  // namespace bitfold
