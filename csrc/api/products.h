// `matmul` and `dequantize` of one kind of weight: the same names for every kind.
#pragma once
#include "api/address.h"

template <class W, class Owner>
void bind_products(nb::module_& m) {
  m.def(
      "matmul",
      [](const Owner& w, uintptr_t x, size_t rows, bool int8, uintptr_t y, int threads) {
        nb::gil_scoped_release released;
        matmul(static_cast<const W&>(w), at<const float>(x), rows, int8, at<float>(y), threads);
      },
      "weight"_a, "x"_a, "rows"_a, "int8"_a, "y"_a, "threads"_a, "y (rows, n) = x (rows, k) W^T, float32.");
  m.def(
      "dequantize",
      [](const Owner& w, size_t begin, size_t end, uintptr_t out, int threads) {
        nb::gil_scoped_release released;
        dequantize(static_cast<const W&>(w), begin, end, at<float>(out), threads);
      },
      "weight"_a, "begin"_a, "end"_a, "out"_a, "threads"_a, "Rows of the weight as float32.");
}
