#include "api/bind.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "api/address.h"
#include "system/bandwidth.h"
#include "system/dispatch.h"
#include "weights/dense/packing.h"

namespace {

void bind_system(nb::module_& m) {
  m.def("isas", &bitfold::isas, "Instruction sets of this build that this CPU has, best last.");
  m.def("isa", [] { return std::string(bitfold::table().name); }, "The instruction set in use.");
  m.def("set_isa", &bitfold::set_isa, "name"_a, "Use this instruction set; '' = the best. False if unavailable.");
  m.def(
      "spin_dots",
      [](size_t rounds) {
        nb::gil_scoped_release released;
        return bitfold::spin_dots(rounds);
      },
      "rounds"_a, "Make dot products of four bytes out of registers, for measuring the peak; returns their number.");
  m.def(
      "split_rows", [] { return bitfold::table().split_rows; },
      "Rows of float activations up to which products by integers run as bytes, in three planes.");
  m.def(
      "read_memory",
      [](uintptr_t data, size_t bytes, int threads) {
        nb::gil_scoped_release released;
        return bitfold::read_memory(at<const uint8_t>(data), bytes, threads);
      },
      "data"_a, "bytes"_a, "threads"_a, "Read memory once, for measuring bandwidth; returns a checksum.");
}

void bind_packing(nb::module_& m) {
  m.def(
      "pack",
      [](uintptr_t codes, size_t rows, size_t length, int bits, uintptr_t out, int threads) {
        nb::gil_scoped_release released;
        return static_cast<int>(bitfold::pack(at<const uint8_t>(codes), rows, length, bits, at<uint8_t>(out), threads));
      },
      "codes"_a, "rows"_a, "length"_a, "bits"_a, "out"_a, "threads"_a,
      "Pack rows x length uint8 codes; returns the bitwise or of all codes.");
  m.def(
      "unpack",
      [](uintptr_t packed, size_t rows, size_t length, int bits, uintptr_t out, int threads) {
        nb::gil_scoped_release released;
        bitfold::unpack(at<const uint8_t>(packed), rows, length, bits, at<uint8_t>(out), threads);
      },
      "packed"_a, "rows"_a, "length"_a, "bits"_a, "out"_a, "threads"_a, "Unpack rows of codes to uint8.");
}

}  // namespace

NB_MODULE(_native, m) {
  nb::set_leak_warnings(false);  // codes and rotations are cached until the interpreter is gone
  m.doc() = "Native core of bitfold; private: use bitfold.formats, bitfold.transforms and bitfold.kernels.";
  bind_system(m);
  bind_packing(m);
  bind_rounding(m);
  bind_rotation(m);
  bind_dense(m);
  bind_trellis(m);
  bind_ggml(m);
  bind_lattice(m);
  bind_engine(m);
  bind_text(m);
}
