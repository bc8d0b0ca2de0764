// The Python face of the native core: names and pointers, no arithmetic.
//
// Tensors come as addresses: the Python side (packing.py, kernels/) has checked dtype, shape, device and contiguity,
// and decoding one token makes hundreds of calls, for which the DLPack handshake would cost more than the arithmetic.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bandwidth.h"
#include "dispatch.h"
#include "linear.h"
#include "packing.h"
#include "viterbi/bind.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// A weight that owns the copy of its last rows.
struct OwnedWeight : bitfold::Weight {
  std::vector<uint8_t> copy;

  void copy_tail() {
    const size_t rows = bitfold::tail_rows(n, row_bytes);
    tail_from = n - rows;
    copy.assign(codes + tail_from * row_bytes, codes + n * row_bytes);
    copy.resize(copy.size() + 64);
    tail = copy.data();
  }
};

void fill_tables(bitfold::Weight& w, const std::vector<float>& points, const std::vector<int>& lut) {
  for (size_t i = 0; i < 16 && !points.empty(); ++i) w.points[i] = points[i % points.size()];
  w.has_lut = !lut.empty();
  for (size_t i = 0; i < 16 && w.has_lut; ++i) w.lut[i] = static_cast<uint8_t>(lut[i % lut.size()]);
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
  bind_viterbi(m);

  m.def(
      "read_memory",
      [](uintptr_t data, size_t bytes, int threads) {
        nb::gil_scoped_release released;
        return bitfold::read_memory(at<const uint8_t>(data), bytes, threads);
      },
      "data"_a, "bytes"_a, "threads"_a, "Read memory once, for measuring bandwidth; returns a checksum.");
  using Weight = OwnedWeight;
  nb::class_<Weight>(m, "Weight", "A weight as the kernels see it; the tensors behind it are the caller's to keep.")
      .def(
          "__init__",
          [](Weight* w, uintptr_t codes, size_t n, size_t k, int bits, uintptr_t scale, uintptr_t zero, bool bf16,
             size_t group, size_t groups, int offset, float unit, bool integers, const std::vector<float>& points,
             const std::vector<int>& lut) {
            new (w) Weight();
            w->codes = at<const uint8_t>(codes);
            w->n = n;
            w->k = k;
            w->row_bytes = bitfold::packed_row_bytes(k, bits);
            w->bits = bits;
            w->scale = at<const void>(scale);
            w->zero = at<const void>(zero);
            w->bf16 = bf16;
            w->group = group;
            w->groups = groups;
            w->offset = offset;
            w->unit = unit;
            w->integers = integers;
            fill_tables(*w, points, lut);
            w->copy_tail();
          },
          "codes"_a, "n"_a, "k"_a, "bits"_a, "scale"_a, "zero"_a, "bf16"_a, "group"_a, "groups"_a, "offset"_a, "unit"_a,
          "integers"_a, "points"_a, "lut"_a);
  m.def(
      "matmul",
      [](const Weight& w, uintptr_t x, size_t rows, bool int8, uintptr_t y, int threads) {
        nb::gil_scoped_release released;
        bitfold::matmul(w, at<const float>(x), rows, int8, at<float>(y), threads);
      },
      "weight"_a, "x"_a, "rows"_a, "int8"_a, "y"_a, "threads"_a, "y (rows, n) = x (rows, k) W^T, float32.");
  m.def(
      "dequantize",
      [](const Weight& w, size_t begin, size_t end, uintptr_t out, int threads) {
        nb::gil_scoped_release released;
        bitfold::dequantize(w, begin, end, at<float>(out), threads);
      },
      "weight"_a, "begin"_a, "end"_a, "out"_a, "threads"_a, "Rows of the weight as float32.");
}
