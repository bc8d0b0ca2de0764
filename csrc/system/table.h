// The table of functions that each instruction set fills in, and nothing else.
//
// A file of csrc/isa is compiled with flags that the other files lack. Whatever it instantiates with external (weak)
// linkage could be picked by the linker for code that runs on a smaller CPU, so those files include no C++ standard
// headers with inline functions, and everything they define lives in a namespace of their own (BITFOLD_NS).
#pragma once
#include "engine/vector.h"
#include "transforms/rotation.h"
#include "weights/activations.h"
#include "weights/dense/rounding.h"
#include "weights/dense/weight.h"
#include "weights/ggml/weight.h"
#include "weights/trellis/weight.h"

namespace bitfold {

// Products by one kind of weight.
template <class W>
struct Products {
  // One row of activations: the arrangement of gemvf, and sums if the weight has zero points.
  void (*arrange)(const W& w, const float* x, size_t padded, float* out, float* sums);
  // Rows [begin, end) of the weight times one row of activations; gemv8: or up to four, see Prepared::by_row.
  void (*gemv8)(const W& w, const Act8& a, size_t begin, size_t end, float* y);
  void (*gemvf)(const W& w, const ActF& a, size_t begin, size_t end, float* y);
  // Any number of rows, see arrange8 and arrangef of the table. begin is a multiple of kBandRows, and so is end unless
  // it is the last.
  void (*gemm8)(const W& w, const Act8& a, size_t begin, size_t end, float* y, void* scratch);
  void (*gemmf)(const W& w, const ActF& a, size_t begin, size_t end, float* y, void* scratch);
};

// Products by ggml's blocks, see loops/ggml.h.
struct GgmlProducts {
  // One row of activations -> a row of a.
  void (*round)(const float* x, size_t k, const GgmlActs& a, size_t row);
  // Rows [begin, end) of the weight times a few rows of activations.
  void (*few)(const GgmlWeight& w, const GgmlActs& a, size_t begin, size_t end, float* y);
  // Times many, arranged by arrangef of the table; scratch: so many bytes for so many rows.
  void (*gemm)(const GgmlWeight& w, const ActF& a, size_t begin, size_t end, float* y, float* scratch);
  size_t (*scratch)(size_t m);
  // Rows [begin, end) as float32.
  void (*decode)(const GgmlWeight& w, size_t begin, size_t end, float* out);
};

// By instruction set, in files of their own: weights/ggml/.
extern const GgmlProducts ggml_scalar, ggml_avx2, ggml_avx512, ggml_neon;

// Products of floats on tiles, see loops/amx_floats.h; where there are none, `least` is out of reach.
struct TileProducts {
  size_t least = ~size_t{0};  // rows of activations from which on they are the faster way
  // Memory of m rows of k; row i of them (what fills up the last block is multiplied, too, and dropped).
  size_t (*bytes)(size_t m, size_t k) = nullptr;
  void (*row)(const float* x, size_t k, size_t i, void* out) = nullptr;
  size_t (*scratch)(size_t m) = nullptr;
  // Rows [begin, end) of the weight; begin is a multiple of kBandRows.
  void (*ggml)(const GgmlWeight& w, const void* acts, size_t m, size_t begin, size_t end, float* y,
               void* scratch) = nullptr;
  // The same; bfloat16 only.
  void (*plain)(const PlainRows& w, const void* acts, size_t m, size_t begin, size_t end, float* y,
                void* scratch) = nullptr;
};

struct Table {
  const char* name;
  size_t lanes;  // 32-bit lanes of a vector; a step is 4 * lanes columns

  // Packs `groups` groups of 8 codes (one byte each) into `bits` bytes each. Returns the bitwise or of all codes, so
  // that the caller sees whether any was too large; what is written is then meaningless. bits in 1..8.
  uint8_t (*pack)(const uint8_t* codes, size_t groups, int bits, uint8_t* out);
  // The inverse: `groups` groups of `bits` bytes into 8 codes each.
  void (*unpack)(const uint8_t* packed, size_t groups, int bits, uint8_t* out);

  // One row of activations: float32 (k) -> int8 (padded, zeros behind k). Returns the scale.
  float (*quantize)(const float* x, size_t k, size_t padded, int8_t* out);
  // The same -> kPlanes rows of bytes and their scales; up to how many rows of floats bytes are the faster way.
  void (*split)(const float* x, size_t k, size_t padded, int8_t* out, float* scales);
  size_t split_rows;
  // A row of activations in planes: its part of start (and of sums, if the weight has zero points) for gemv8.
  void (*sums8)(const Scaled& w, const int8_t* x, size_t planes, size_t padded, size_t row, int32_t* start,
                float* sums);
  // One row of any number, to its place in blocks of block_rows(m) (x null: one of zeros, which fills up the last
  // block); see gemm.h for their arrangement and the scratch memory.
  size_t (*block_rows)(size_t m);
  void (*arrange8)(const Scaled& w, const int8_t* x, size_t m, size_t padded, size_t row, int8_t* out, int32_t* start,
                   float* sums);
  void (*arrangef)(const Scaled& w, const float* x, size_t m, size_t padded, size_t row, float* out, float* sums);
  size_t (*gemm_scratch)(const Scaled& w, size_t m, size_t padded);
  // The same of arrangef and gemmf, which a set with tiles of bytes leaves as they are.
  size_t (*block_rowsf)(size_t m);
  size_t (*gemm_scratchf)(const Scaled& w, size_t m, size_t padded);
  Products<DenseWeight> dense;
  Products<TrellisWeight> trellis;
  const GgmlProducts* ggml;
  TileProducts tiles;

  // One row of the weight out of its unpacked codes; rows [begin, end) out of trellis tiles.
  void (*decode)(const DenseWeight& w, size_t row, const uint8_t* codes, float* out);
  void (*decode_tiles)(const TrellisWeight& w, size_t begin, size_t end, float* out);
  // Blocks of eight weights on the E8 lattice as bytes, see weights/lattice/e8p.h.
  void (*lattice_bytes)(const uint8_t* codes, const uint8_t* magnitudes, size_t blocks, uint8_t* out);
  // One row of activations rotated; scratch: r.size floats.
  void (*rotate)(const Rotation& r, const float* x, float* out, float* scratch);
  // rounding.h, in one thread; feed: weights [begin, end) of every column.
  void (*grid_errors)(const Integers& grid, const float* w, size_t blocks, size_t length, const float* scale,
                      const float* zero, float* error);
  void (*feed)(const Integers& grid, const ColumnScales& scales, const Columns& columns, uint8_t* codes, size_t begin,
               size_t end);
  // spin_dots of bandwidth.h.
  size_t (*dots)(size_t rounds);

  // loops/engine.h, in one thread.
  float (*largest)(const float* x, size_t n);
  float (*sum_squares)(const float* x, size_t n);
  void (*weighted)(const float* x, float scale, const float* weight, size_t n, float* out);
  void (*gated)(Activation kind, const float* gate, const float* up, size_t n, float* out);
  void (*turn_pairs)(float* x, const float* cosine, const float* sine, size_t half);
  void (*attend)(const Attend& a);
  size_t attend_rows;                    // of one head, that are best looked at together
  size_t (*attend_scratch)(size_t dim);  // bytes of Attend::tiles
  void (*plain_rows)(const PlainRows& w, const float* x, size_t m, size_t begin, size_t end, float* y);

  template <class W>
  const Products<W>& products() const;
};

template <>
inline const Products<DenseWeight>& Table::products() const {
  return dense;
}

template <>
inline const Products<TrellisWeight>& Table::products() const {
  return trellis;
}

constexpr size_t kBandRows = 32;  // of the weight: what begins elsewhere would share a band of tiles with its neighbour
constexpr size_t kRowGrain = 64;  // that a thread takes at least

}  // namespace bitfold
