// The loops of AMX on emulated tile registers, for machines without AMX. Compiled with the flags of AVX-512.
#define BITFOLD_NS amx_emulated
#include "simd/avx512.h"
#include "viterbi/tile_avx512.h"

#include "loops/amx.h"

namespace bitfold {
namespace amx_emulated {

// One tile register after the other, as the manual of the instructions has it; memory beyond a tile is not touched.
struct Tiles {
  struct Register {
    size_t rows, bytes;
    uint8_t at[16][64];
  };
  static inline thread_local Register tile[8];

  static void configure(size_t depth) {
    for (int i = 0; i < 8; ++i) {
      tile[i].bytes = i == 4 || i == 5 ? depth : 64;
      tile[i].rows = i >= 6 ? depth / 4 : 16;
    }
  }
  static void release() {
    for (Register& t : tile) t.rows = t.bytes = 0;
  }
  template <int I>
  static void zero() {
    memset(tile[I].at, 0, sizeof(tile[I].at));
  }
  template <int I>
  static void load(const void* p, size_t stride) {
    zero<I>();
    for (size_t r = 0; r < tile[I].rows; ++r)
      memcpy(tile[I].at[r], static_cast<const uint8_t*>(p) + r * stride, tile[I].bytes);
  }
  template <int I>
  static void store(void* p, size_t stride) {
    for (size_t r = 0; r < tile[I].rows; ++r)
      memcpy(static_cast<uint8_t*>(p) + r * stride, tile[I].at[r], tile[I].bytes);
  }
  template <int C, int A, int B>
  static void dot() {
    for (size_t m = 0; m < tile[C].rows; ++m)
      for (size_t k = 0; k < tile[A].bytes / 4; ++k)
        for (size_t n = 0; n < tile[C].bytes / 4; ++n) {
          int32_t sum;
          memcpy(&sum, tile[C].at[m] + 4 * n, 4);
          for (int i = 0; i < 4; ++i)
            sum += static_cast<int8_t>(tile[A].at[m][4 * k + i]) * static_cast<int>(tile[B].at[k][4 * n + i]);
          memcpy(tile[C].at[m] + 4 * n, &sum, 4);
        }
  }
};

}  // namespace amx_emulated

void use_emulated_amx(Table& t) {
  t.name = "amx-emulated";
  t.block_rows = amx_emulated::amx_rows;
  t.arrange8 = amx_emulated::amx_arrange<amx_emulated::Simd>;
  t.gemm_scratch = amx_emulated::gemm_scratch<amx_emulated::Simd, amx_emulated::amx_rows>;
  t.gemm8 = amx_emulated::amx_gemm8<amx_emulated::Simd, amx_emulated::Tiles>;
}

}  // namespace bitfold
