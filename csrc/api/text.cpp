#include <string_view>
#include <vector>

#include "api/address.h"
#include "api/bind.h"
#include "text/pieces.h"

namespace {

// The pairs are made of the strings of `pieces` themselves: half a million tuples of new ones would take longer than
// all else.
nb::list merges_by_score(const nb::list& pieces, uintptr_t scores) {
  std::vector<std::string_view> views;
  views.reserve(nb::len(pieces));
  for (nb::handle piece : pieces) {
    Py_ssize_t size = 0;
    const char* data = PyUnicode_AsUTF8AndSize(piece.ptr(), &size);
    if (data == nullptr) nb::raise_python_error();
    views.emplace_back(data, static_cast<size_t>(size));
  }
  std::vector<bitfold::Cut> cuts;
  {
    nb::gil_scoped_release released;
    cuts = bitfold::cuts_by_score(views, at<const float>(scores));
  }
  nb::object found = nb::steal(PyList_New(static_cast<Py_ssize_t>(cuts.size())));
  if (!found.is_valid()) nb::raise_python_error();
  for (size_t i = 0; i < cuts.size(); ++i) {
    PyObject* pair = PyTuple_Pack(2, pieces[cuts[i].left].ptr(), pieces[cuts[i].right].ptr());
    if (pair == nullptr) nb::raise_python_error();
    PyList_SET_ITEM(found.ptr(), static_cast<Py_ssize_t>(i), pair);
  }
  return nb::borrow<nb::list>(found);
}

}  // namespace

void bind_text(nb::module_& m) {
  m.def("merges_by_score", &merges_by_score, "pieces"_a, "scores"_a,
        "Both halves of every way to cut a piece in two pieces: see pieces.h.");
}
