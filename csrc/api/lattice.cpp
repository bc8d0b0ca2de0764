#include "api/bind.h"

#include "api/address.h"
#include "weights/lattice/e8p.h"

void bind_lattice(nb::module_& m) {
  using Weight = bitfold::LatticeWeight;
  nb::class_<Weight>(m, "LatticeWeight", "A weight in points of the E8 lattice; its tensors are the caller's to keep.")
      .def(
          "__init__",
          [](Weight* w, uintptr_t codes, size_t n, size_t k, uintptr_t scale, uintptr_t magnitudes) {
            new (w) Weight{at<const uint8_t>(codes), at<const void>(scale), at<const uint8_t>(magnitudes), n, k};
          },
          "codes"_a, "n"_a, "k"_a, "scale"_a, "magnitudes"_a);
  m.def(
      "matmul",
      [](const Weight& w, uintptr_t x, size_t rows, bool int8, uintptr_t y, int threads) {
        nb::gil_scoped_release released;
        bitfold::matmul(w, at<const float>(x), rows, int8, at<float>(y), threads);
      },
      "weight"_a, "x"_a, "rows"_a, "int8"_a, "y"_a, "threads"_a);
  m.def(
      "dequantize",
      [](const Weight& w, size_t begin, size_t end, uintptr_t out, int threads) {
        nb::gil_scoped_release released;
        bitfold::dequantize(w, begin, end, at<float>(out), threads);
      },
      "weight"_a, "begin"_a, "end"_a, "out"_a, "threads"_a);
}
