#include <nanobind/stl/string.h>

#include <cstring>
#include <stdexcept>
#include <string>

#include "api/bind.h"
#include "api/products.h"
#include "weights/linear.h"

using bitfold::GgmlBlock;
using bitfold::GgmlType;
using bitfold::GgmlWeight;
using bitfold::kGgmlBlocks;

void bind_ggml(nb::module_& m) {
  m.def(
      "ggml_types",
      [] {
        nb::list names;
        for (const GgmlBlock& block : kGgmlBlocks) names.append(block.name);
        return names;
      },
      "Types of ggml's blocks that GgmlWeight takes.");
  nb::class_<GgmlWeight>(m, "GgmlWeight", "Rows of ggml's blocks; the memory behind it is the caller's to keep.")
      .def(
          "__init__",
          [](GgmlWeight* w, const std::string& type, uintptr_t blocks, size_t n, size_t k) {
            for (size_t i = 0; i < sizeof(kGgmlBlocks) / sizeof(GgmlBlock); ++i) {
              const GgmlBlock& block = kGgmlBlocks[i];
              if (type != block.name || k % block.columns) continue;
              new (w) GgmlWeight{static_cast<GgmlType>(i), n, k, at<const uint8_t>(blocks),
                                 k / block.columns * block.bytes};
              return;
            }
            throw std::invalid_argument("not rows of blocks that the core knows");
          },
          "type"_a, "blocks"_a, "n"_a, "k"_a);
  bind_products<GgmlWeight, GgmlWeight>(m);
}
