// AArch64 with i8mm (Armv8.6: Neoverse V1, Apple M2 and later), for several rows of activations; the rest is NEON's.
#define BITFOLD_NS neon_i8mm
#define BITFOLD_I8MM
#include "simd/neon.h"
#include "weights/trellis/tile_neon.h"

#include "loops/trellis.h"

namespace bitfold {

// What differs from NEON with dotprod.
void use_i8mm(Table& t) {
  t.name = "neon_i8mm";
  t.arrange8 = neon_i8mm::arrange_bytes<neon_i8mm::Simd>;
  t.dense.gemm8 = neon_i8mm::gemm_bytes<neon_i8mm::Simd>;
  t.trellis.gemm8 = neon_i8mm::gemm_bytes<neon_i8mm::Simd>;
}

}  // namespace bitfold
