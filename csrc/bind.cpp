// The Python face of the native core: names and pointers, no arithmetic.
//
// Tensors come as addresses: the Python side (packing.py, kernels/) has checked dtype, shape, device and contiguity,
// and decoding one token makes hundreds of calls, for which the DLPack handshake would cost more than the arithmetic.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "dispatch.h"
#include "packing.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "Native core of bitfold; private: use bitfold.packing and bitfold.kernels.";
  m.def("isas", &bitfold::isas, "Instruction sets of this build that this CPU has, best last.");
  m.def("isa", [] { return std::string(bitfold::table().name); }, "The instruction set in use.");
  m.def("set_isa", &bitfold::set_isa, "name"_a, "Use this instruction set; '' = the best. False if unavailable.");
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
