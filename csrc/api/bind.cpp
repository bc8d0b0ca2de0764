// The Python face of the native core: names and pointers, no arithmetic.
//
// Tensors come as addresses (address.h): the Python side (packing.py, kernels/) has checked dtype, shape, device and
// contiguity, and decoding one token makes hundreds of calls, for which the DLPack handshake would cost more than the
// arithmetic.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>

#include "api/address.h"
#include "api/bind.h"
#include "system/bandwidth.h"
#include "system/dispatch.h"
#include "weights/dense/packing.h"
#include "weights/dense/rounding.h"
#include "weights/linear.h"
#include "weights/trellis/viterbi.h"

namespace {

// A weight that owns the copy of its last rows, or its trellis code.
struct OwnedWeight : bitfold::Weight {
  std::vector<uint8_t> copy, columns;
  std::vector<int16_t> levels;
  bitfold::TrellisCode code;

  void copy_tail() {
    const size_t rows = bitfold::tail_rows(n, row_bytes);
    tail_from = n - rows;
    copy.assign(codes + tail_from * row_bytes, codes + n * row_bytes);
    copy.resize(copy.size() + 64);
    tail = copy.data();
  }
};

// A table in steps, as the formats have it; the core counts in 1/16.
bool fill_trellis(OwnedWeight& w, int bits, const std::vector<int>& columns, const std::vector<int>& table) {
  w.columns.assign(columns.begin(), columns.end());
  for (int v : table) w.levels.push_back(static_cast<int16_t>(16 * v));
  int index_bits = 0;
  while (size_t{1} << index_bits < table.size()) ++index_bits;
  w.code = {bits, static_cast<int>(columns.size()), index_bits, 4, w.columns.data(), w.levels.data()};
  if (table.size() != size_t{1} << index_bits || !bitfold::trellis_valid(w.code)) return false;
  w.trellis = &w.code;
  w.row_bytes = (w.k + 3) / 4 * 16 * static_cast<size_t>(bits);
  w.tail_from = w.n;
  w.bf16 = true;
  w.offset = 128;
  return true;
}

void fill_tables(bitfold::Weight& w, const std::vector<float>& points, const std::vector<int>& lut) {
  for (size_t i = 0; i < 16 && !points.empty(); ++i) w.points[i] = points[i % points.size()];
  w.has_lut = !lut.empty();
  for (size_t i = 0; i < 16 && w.has_lut; ++i) w.lut[i] = static_cast<uint8_t>(lut[i % lut.size()]);
}

void bind_rounding(nb::module_& m) {
  m.def(
      "rounding_errors",
      [](float low, float high, uintptr_t w, size_t blocks, size_t length, uintptr_t scale, uintptr_t zero,
         uintptr_t error, int threads) {
        nb::gil_scoped_release released;
        bitfold::rounding_errors({low, high}, at<const float>(w), blocks, length, at<const float>(scale),
                                 at<const float>(zero), at<float>(error), threads);
      },
      "low"_a, "high"_a, "w"_a, "blocks"_a, "length"_a, "scale"_a, "zero"_a, "error"_a, "threads"_a,
      "Mean square errors (blocks) of rounding (blocks, length) float32 to integers under one scale each.");
  m.def(
      "rounding_feedback",
      [](float low, float high, size_t count, size_t rows, uintptr_t lower, size_t stride, uintptr_t target,
         uintptr_t carried, uintptr_t places, size_t group, uintptr_t scale, uintptr_t zero, uintptr_t kept,
         uintptr_t codes, uintptr_t decoded, uintptr_t error, int threads) {
        nb::gil_scoped_release released;
        const bitfold::Columns columns{count,
                                       rows,
                                       at<const float>(lower),
                                       stride,
                                       at<const float>(target),
                                       at<const float>(carried),
                                       at<const int64_t>(places),
                                       group,
                                       at<const float>(scale),
                                       at<const float>(zero),
                                       at<const uint8_t>(kept),
                                       at<uint8_t>(codes),
                                       at<float>(decoded),
                                       at<float>(error)};
        bitfold::rounding_feedback({low, high}, columns, threads);
      },
      "low"_a, "high"_a, "count"_a, "rows"_a, "lower"_a, "stride"_a, "target"_a, "carried"_a, "places"_a, "group"_a,
      "scale"_a, "zero"_a, "kept"_a, "codes"_a, "decoded"_a, "error"_a, "threads"_a,
      "Code columns (count, rows) to integers one after the other, errors fed forward.");
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
  bind_trellis(m);
  bind_rounding(m);
  m.def(
      "rotate",
      [](uintptr_t x, size_t rows, size_t size, size_t width, size_t order, uintptr_t matrix, uintptr_t signs,
         float scale, bool inverse, uintptr_t out, int threads) {
        nb::gil_scoped_release released;
        const bitfold::Rotation r{size, width, order, at<const float>(matrix), at<const float>(signs), scale, inverse};
        bitfold::rotate(r, at<const float>(x), rows, at<float>(out), threads);
      },
      "x"_a, "rows"_a, "size"_a, "width"_a, "order"_a, "matrix"_a, "signs"_a, "scale"_a, "inverse"_a, "out"_a,
      "threads"_a, "Hadamard rotation of rows of float32, or its inverse.");
  m.def(
      "spin_dots",
      [](size_t rounds) {
        nb::gil_scoped_release released;
        return bitfold::spin_dots(rounds);
      },
      "rounds"_a, "Make dot products of four bytes out of registers, for measuring the peak; returns their number.");

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
          "integers"_a, "points"_a, "lut"_a)
      .def(
          "__init__",
          [](Weight* w, uintptr_t tiles, size_t n, size_t k, int bits, uintptr_t scale, const std::vector<int>& columns,
             const std::vector<int>& table) {
            new (w) Weight();
            w->codes = at<const uint8_t>(tiles);
            w->n = n;
            w->k = k;
            w->scale = at<const void>(scale);
            if (fill_trellis(*w, bits, columns, table)) return;
            w->~Weight();
            throw std::invalid_argument("not a trellis code that the kernels know");
          },
          "tiles"_a, "n"_a, "k"_a, "bits"_a, "scale"_a, "columns"_a, "table"_a, "A weight in trellis tiles.");
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
  bind_lattice(m);
}
