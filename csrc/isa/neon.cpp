// AArch64 with dotprod. Packing in 64-bit words is already at memory speed there.
#define BITFOLD_NS neon
#include "simd/neon.h"
#include "weights/trellis/tile_neon.h"

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
namespace neon {

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

}  // namespace neon
}  // namespace bitfold

#define BITFOLD_TABLE table_neon
#define BITFOLD_GGML ggml_neon
#include "loops/table.inc"
