// Plain C++: every CPU.
#define BITFOLD_NS scalar
#include "simd/scalar.h"
#include "weights/trellis/tile_plain.h"

#include "loops/dequant.h"
#include "loops/engine.h"
#include "loops/few.h"
#include "loops/gemm.h"
#include "loops/gemv.h"
#include "loops/hadamard.h"
#include "loops/lattice.h"
#include "loops/rounding.h"
#include "loops/trellis.h"

namespace bitfold {
namespace scalar {

struct Pack {
  template <int B>
  static uint8_t run(const uint8_t* codes, size_t groups, uint8_t* out) {
    return or_bytes(pack_words<B>(codes, groups, out));
  }
};

struct Unpack {
  template <int B>
  static void run(const uint8_t* packed, size_t groups, uint8_t* out) {
    unpack_words<B>(packed, groups, out);
  }
};

}  // namespace scalar
}  // namespace bitfold

#define BITFOLD_TABLE table_scalar
#define BITFOLD_GGML ggml_scalar
#include "loops/table.inc"
