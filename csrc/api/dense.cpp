#include "weights/dense/weight.h"

#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "api/bind.h"
#include "api/products.h"
#include "weights/dense/packing.h"
#include "weights/linear.h"

namespace {

using bitfold::Codes;
using bitfold::DenseWeight;
using bitfold::Scales;
using bitfold::Tables;

// What codes mean, whichever weight they are of.
struct Grid : Codes, Tables {};

float number(const void* numbers, size_t i, bool bf16) {
  if (!bf16) return static_cast<const float*>(numbers)[i];
  const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(numbers)[i]) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// Whether Scales::whole holds.
bool whole(const DenseWeight& w) {
  if (!w.zero) return true;
  if (w.unit != 1) return false;
  const int most = w.has_lut ? *std::max_element(w.lut, w.lut + 16) : (1 << w.bits) - 1;
  const float low = static_cast<float>(most - w.offset - 127), high = static_cast<float>(128 - w.offset);
  for (size_t i = 0; i < w.n * w.groups; ++i) {
    const float zero = number(w.zero, i, w.bf16);
    if (!(zero >= low && zero <= high && zero == std::floor(zero))) return false;
  }
  return true;
}

// A weight that owns the copy of its last rows.
struct OwnedDense : DenseWeight {
  std::vector<uint8_t> copy;

  OwnedDense(const uint8_t* bytes, size_t rows, size_t columns, const Grid& grid, const Scales& scales) {
    static_cast<Codes&>(*this) = grid;
    static_cast<Tables&>(*this) = grid;
    static_cast<Scales&>(*this) = scales;
    n = rows;
    k = columns;
    Scales::whole = ::whole(*this);
    codes = bytes;
    row_bytes = bitfold::packed_row_bytes(k, bits);
    const size_t last = bitfold::tail_rows(n, row_bytes);
    tail_from = n - last;
    copy.assign(codes + tail_from * row_bytes, codes + n * row_bytes);
    copy.resize(copy.size() + 64);
    tail = copy.data();
  }
};

void bind_structs(nb::module_& m) {
  nb::class_<Scales>(m, "Scales", "What the numbers of a row are multiplied with: see scaled.h.")
      .def(
          "__init__",
          [](Scales* s, uintptr_t scale, uintptr_t zero, bool bf16, size_t group, size_t groups) {
            new (s) Scales{at<const void>(scale), at<const void>(zero), bf16, false, group, groups};
          },
          nb::kw_only(), "scale"_a, "zero"_a, "bf16"_a, "group"_a, "groups"_a);
  nb::class_<Grid>(m, "Grid", "What the codes of a dense weight mean: see scaled.h and dense/weight.h.")
      .def(
          "__init__",
          [](Grid* g, int bits, bool integers, int offset, float unit, const std::vector<float>& points,
             const std::vector<int>& lut) {
            new (g) Grid();
            g->bits = bits;
            g->integers = integers;
            g->offset = offset;
            g->unit = unit;
            g->has_lut = !lut.empty();
            for (size_t i = 0; i < 16 && !points.empty(); ++i) g->points[i] = points[i % points.size()];
            for (size_t i = 0; i < 16 && g->has_lut; ++i) g->lut[i] = static_cast<uint8_t>(lut[i % lut.size()]);
          },
          nb::kw_only(), "bits"_a, "integers"_a, "offset"_a, "unit"_a, "points"_a, "lut"_a);
}

}  // namespace

void bind_dense(nb::module_& m) {
  bind_structs(m);
  nb::class_<DenseWeight>(m, "AnyDenseWeight", "What the engine takes.");
  nb::class_<OwnedDense, DenseWeight>(m, "DenseWeight",
                                      "Rows of packed codes; the tensors behind it are the caller's to keep.")
      .def(
          "__init__",
          [](OwnedDense* w, uintptr_t codes, size_t n, size_t k, const Grid& grid, const Scales& scales) {
            new (w) OwnedDense(at<const uint8_t>(codes), n, k, grid, scales);
          },
          "codes"_a, "n"_a, "k"_a, "grid"_a, "scales"_a);
  bind_products<DenseWeight, OwnedDense>(m);
}
