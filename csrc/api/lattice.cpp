#include "api/bind.h"
#include "api/products.h"
#include "weights/linear.h"

using bitfold::LatticeWeight;

void bind_lattice(nb::module_& m) {
  nb::class_<LatticeWeight>(m, "LatticeWeight", "Points of the E8 lattice; its tensors are the caller's to keep.")
      .def(
          "__init__",
          [](LatticeWeight* w, uintptr_t codes, size_t n, size_t k, uintptr_t scale, uintptr_t magnitudes) {
            new (w) LatticeWeight{at<const uint8_t>(codes), at<const void>(scale), at<const uint8_t>(magnitudes), n, k};
          },
          "codes"_a, "n"_a, "k"_a, "scale"_a, "magnitudes"_a);
  bind_products<LatticeWeight, LatticeWeight>(m);
}
