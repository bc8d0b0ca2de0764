#include "weights/dense/rounding.h"

#include "api/address.h"
#include "api/bind.h"

namespace {

using bitfold::Columns;
using bitfold::ColumnScales;
using bitfold::Integers;

void bind_structs(nb::module_& m) {
  nb::class_<Integers>(m, "Integers", "A grid of the whole numbers from low to high.")
      .def("__init__", [](Integers* g, float low, float high) { new (g) Integers{low, high}; }, "low"_a, "high"_a);
  nb::class_<ColumnScales>(m, "ColumnScales", "What the columns of a weight are rounded with: see rounding.h.")
      .def(
          "__init__",
          [](ColumnScales* s, size_t group, uintptr_t scale, uintptr_t zero) {
            new (s) ColumnScales{group, at<const float>(scale), at<const float>(zero)};
          },
          nb::kw_only(), "group"_a, "scale"_a, "zero"_a);
  nb::class_<Columns>(m, "Columns", "Neighbouring columns on their way through error feedback: see rounding.h.")
      .def(
          "__init__",
          [](Columns* c, size_t count, size_t rows, uintptr_t lower, size_t stride, uintptr_t target, uintptr_t carried,
             uintptr_t places, uintptr_t kept, uintptr_t decoded, uintptr_t error) {
            new (c) Columns();
            c->count = count;
            c->rows = rows;
            c->lower = at<const float>(lower);
            c->stride = stride;
            c->target = at<const float>(target);
            c->carried = at<const float>(carried);
            c->places = at<const int64_t>(places);
            c->kept = at<const uint8_t>(kept);
            c->decoded = at<float>(decoded);
            c->error = at<float>(error);
          },
          nb::kw_only(), "count"_a, "rows"_a, "lower"_a, "stride"_a, "target"_a, "carried"_a, "places"_a, "kept"_a,
          "decoded"_a, "error"_a);
}

}  // namespace

void bind_rounding(nb::module_& m) {
  bind_structs(m);
  m.def(
      "rounding_errors",
      [](const Integers& grid, uintptr_t w, size_t blocks, size_t length, uintptr_t scale, uintptr_t zero,
         uintptr_t error, int threads) {
        nb::gil_scoped_release released;
        bitfold::rounding_errors(grid, at<const float>(w), blocks, length, at<const float>(scale),
                                 at<const float>(zero), at<float>(error), threads);
      },
      "grid"_a, "w"_a, "blocks"_a, "length"_a, "scale"_a, "zero"_a, "error"_a, "threads"_a,
      "Mean square errors (blocks) of rounding (blocks, length) float32 to integers under one scale each.");
  m.def(
      "rounding_feedback",
      [](const Integers& grid, const ColumnScales& scales, const Columns& columns, uintptr_t codes, int threads) {
        nb::gil_scoped_release released;
        bitfold::rounding_feedback(grid, scales, columns, at<uint8_t>(codes), threads);
      },
      "grid"_a, "scales"_a, "columns"_a, "codes"_a, "threads"_a,
      "Code columns (count, rows) to integers one after the other, errors fed forward.");
}
