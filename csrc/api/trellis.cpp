#include <nanobind/stl/vector.h>

#include <stdexcept>

#include "api/bind.h"
#include "api/products.h"
#include "weights/linear.h"
#include "weights/trellis/viterbi.h"
#include "weights/trellis/weight.h"

namespace {

using bitfold::TrellisCode;
using bitfold::TrellisWeight;

// A code that owns its hash and its table.
struct OwnedCode : TrellisCode {
  std::vector<uint8_t> hash;
  std::vector<int16_t> table;

  // values: in steps, as the formats have them; the core counts in 1/16.
  OwnedCode(int k, int resolution, const std::vector<int>& hash_columns, const std::vector<int>& values)
      : hash(hash_columns.begin(), hash_columns.end()) {
    for (int v : values) table.push_back(static_cast<int16_t>(16 * v));
    bits = k;
    window = static_cast<int>(hash.size());
    while (size_t{1} << index_bits < table.size()) ++index_bits;
    gain = resolution;
    columns = hash.data();
    levels = table.data();
    if (table.size() != size_t{1} << index_bits || !bitfold::trellis_valid(*this))
      throw std::invalid_argument("not a trellis code that the core knows");
  }
};

void bind_codec(nb::module_& m) {
  nb::class_<OwnedCode>(m, "TrellisCode", "A sliding-window code: see trellis/kernel.h.")
      .def(nb::init<int, int, const std::vector<int>&, const std::vector<int>&>(), nb::kw_only(), "bits"_a, "gain"_a,
           "columns"_a, "table"_a);
  m.def(
      "trellis_encode",
      [](const OwnedCode& code, uintptr_t x, size_t tiles, uintptr_t bytes, uintptr_t values, bool thorough,
         int threads) {
        nb::gil_scoped_release released;
        return bitfold::trellis_encode(code, at<const float>(x), tiles, at<uint8_t>(bytes), at<int8_t>(values),
                                       thorough, threads);
      },
      "code"_a, "x"_a, "tiles"_a, "bytes"_a, "values"_a, "thorough"_a, "threads"_a,
      "Encode (tiles, 128) float32 to (tiles, 16 bits) bytes and (tiles, 128) int8 table values; False = no memory.");
  m.def(
      "trellis_decode",
      [](const OwnedCode& code, uintptr_t bytes, size_t tiles, uintptr_t values, int threads) {
        nb::gil_scoped_release released;
        return bitfold::trellis_decode(code, at<const uint8_t>(bytes), tiles, at<int8_t>(values), threads);
      },
      "code"_a, "bytes"_a, "tiles"_a, "values"_a, "threads"_a, "The table values (tiles, 128) of encoded tiles.");
}

}  // namespace

void bind_trellis(nb::module_& m) {
  bind_codec(m);
  nb::class_<TrellisWeight>(m, "TrellisWeight", "Trellis tiles; the tensors behind it are the caller's to keep.")
      .def(
          "__init__",
          [](TrellisWeight* w, uintptr_t tiles, size_t n, size_t k, uintptr_t scale, const OwnedCode& code) {
            new (w) TrellisWeight();
            w->n = n;
            w->k = k;
            w->tiles = at<const uint8_t>(tiles);
            w->band_bytes = (k + 3) / 4 * 16 * static_cast<size_t>(code.bits);
            w->scale = at<const void>(scale);
            w->code = code;
          },
          "tiles"_a, "n"_a, "k"_a, "scale"_a, "code"_a, nb::keep_alive<1, 6>());
  bind_products<TrellisWeight, TrellisWeight>(m);
}
