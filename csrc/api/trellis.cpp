#include "api/bind.h"

#include "api/address.h"
#include "weights/trellis/viterbi.h"

namespace {

bitfold::TrellisCode code_of(int bits, int window, int index_bits, int gain, uintptr_t columns, uintptr_t levels) {
  return {bits, window, index_bits, gain, at<const uint8_t>(columns), at<const int16_t>(levels)};
}

}  // namespace

void bind_trellis(nb::module_& m) {
  m.def(
      "trellis_encode",
      [](int bits, int window, int index_bits, int gain, uintptr_t columns, uintptr_t levels, uintptr_t x, size_t tiles,
         uintptr_t bytes, uintptr_t values, bool thorough, int threads) {
        nb::gil_scoped_release released;
        return bitfold::trellis_encode(code_of(bits, window, index_bits, gain, columns, levels), at<const float>(x),
                                       tiles, at<uint8_t>(bytes), at<int8_t>(values), thorough, threads);
      },
      "bits"_a, "window"_a, "index_bits"_a, "gain"_a, "columns"_a, "levels"_a, "x"_a, "tiles"_a, "bytes"_a, "values"_a,
      "thorough"_a, "threads"_a,
      "Encode (tiles, 128) float32 to (tiles, 16 bits) bytes and (tiles, 128) int8 table values; False = bad code or "
      "no memory.");
  m.def(
      "trellis_decode",
      [](int bits, int window, int index_bits, int gain, uintptr_t columns, uintptr_t levels, uintptr_t bytes,
         size_t tiles, uintptr_t values, int threads) {
        nb::gil_scoped_release released;
        return bitfold::trellis_decode(code_of(bits, window, index_bits, gain, columns, levels),
                                       at<const uint8_t>(bytes), tiles, at<int8_t>(values), threads);
      },
      "bits"_a, "window"_a, "index_bits"_a, "gain"_a, "columns"_a, "levels"_a, "bytes"_a, "tiles"_a, "values"_a,
      "threads"_a, "The table values (tiles, 128) of encoded tiles; False = bad code.");
}
