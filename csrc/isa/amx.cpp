// AMX with int8 and bfloat16 (Sapphire Rapids and later), for several rows of activations; everything else is
// AVX-512's.
#define BITFOLD_NS amx
#include "simd/avx512.h"
#include "weights/trellis/tile_avx512.h"

#include "loops/amx.h"
#include "loops/amx_attend.h"
#include "loops/amx_floats.h"

namespace bitfold {
namespace amx {

struct Tiles {
  // Palette 1; sums and weights are 64 bytes wide, activations `depth`.
  static void configure(size_t depth) {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    static_assert(sizeof(config) == 64, "the operand of ldtilecfg");
    for (int i = 0; i < 8; ++i) {
      config.bytes[i] = i == 4 || i == 5 ? static_cast<uint16_t>(depth) : 64;
      config.rows[i] = i >= 6 ? static_cast<uint8_t>(depth / 4) : 16;
    }
    // Not the intrinsic: gcc 12's tells the compiler of 8 of the 64 bytes only.
    __asm__ volatile("ldtilecfg %0" ::"m"(config));
  }
  static void release() { __asm__ volatile("tilerelease"); }

  // Intrinsics want the registers' numbers as literals; %c takes them from template arguments.
  template <int I>
  static void zero() {
    __asm__ volatile("tilezero %%tmm%c0" ::"i"(I));
  }
  template <int I>
  static void load(const void* p, size_t stride) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(I) : "memory");
  }
  template <int I>
  static void store(void* p, size_t stride) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(I) : "memory");
  }
  template <int C, int A, int B>
  static void dot() {  // bytes with a sign
    __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
  }
  template <int C, int A, int B>
  static void dot_unsigned() {  // those of B without
    __asm__ volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
  }
  // Numbers in bfloat16, sums in float32.
  template <int C, int A, int B>
  static void dot_bf16() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
  }
};

}  // namespace amx

// What differs from AVX-512.
void use_amx(Table& t) {
  t.name = "amx";
  t.block_rows = amx::amx_rows<amx::Simd>;
  t.arrange8 = amx::amx_arrange<amx::Simd>;
  t.gemm_scratch = amx::amx_scratch<amx::Simd>;
  t.dense.gemm8 = amx::amx_gemm8<amx::Simd, amx::Tiles>;
  t.trellis.gemm8 = amx::amx_gemm8<amx::Simd, amx::Tiles>;
  t.attend = amx::tile_attend<amx::Simd, amx::Tiles>;
  t.attend_rows = amx::kAttendRows;
  t.attend_scratch = amx::TileAttention<amx::Simd, amx::Tiles>::scratch;
  t.tiles.least = amx::kMostFew + 1;
  t.tiles.bytes = amx::TileActs<amx::Simd>::bytes;
  t.tiles.row = amx::TileActs<amx::Simd>::row;
  t.tiles.scratch = amx::tile_scratch<amx::Simd>;
  t.tiles.ggml = amx::tile_ggml<amx::Simd, amx::Tiles>;
  t.tiles.plain = amx::tile_plain<amx::Simd, amx::Tiles>;
}

}  // namespace bitfold
