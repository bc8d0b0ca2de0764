#include "transforms/rotation.h"

#include "api/address.h"
#include "api/bind.h"

using bitfold::Rotation;

void bind_rotation(nb::module_& m) {
  nb::class_<Rotation>(m, "Rotation", "A Hadamard rotation: see rotation.h; its tensors are the caller's to keep.")
      .def(
          "__init__",
          [](Rotation* r, size_t size, size_t width, size_t order, uintptr_t matrix, uintptr_t signs, float scale,
             bool inverse) {
            new (r) Rotation{size, width, order, at<const float>(matrix), at<const float>(signs), scale, inverse};
          },
          nb::kw_only(), "size"_a, "width"_a, "order"_a, "matrix"_a, "signs"_a, "scale"_a, "inverse"_a);
  m.def(
      "rotate",
      [](const Rotation& rotation, uintptr_t x, size_t rows, uintptr_t out, int threads) {
        nb::gil_scoped_release released;
        bitfold::rotate(rotation, at<const float>(x), rows, at<float>(out), threads);
      },
      "rotation"_a, "x"_a, "rows"_a, "out"_a, "threads"_a, "Rows of float32 rotated.");
}
