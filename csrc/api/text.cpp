#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "api/address.h"
#include "api/bind.h"
#include "text/pieces.h"

void bind_text(nb::module_& m) {
  m.def(
      "cuts_by_score",
      [](const std::vector<std::string>& pieces, uintptr_t scores) {
        nb::gil_scoped_release released;
        return bitfold::cuts_by_score(pieces, at<const float>(scores));
      },
      "pieces"_a, "scores"_a, "Indices of both halves of every way to cut a piece in two pieces: see pieces.h.");
}
