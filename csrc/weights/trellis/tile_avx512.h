// Decoding of trellis tiles with AVX-512 VBMI and GFNI: two registers of 64 table values out of 16 * k bytes.
//
// A tile is 32 rows x 4 columns; each register holds 16 rows, 4 columns of a row in a 32-bit lane: the operand of
// vpdpbusd (16 dot products of four columns at once) and a row of an AMX tile.
//
// Runs of 8 / k weights (2 for k = 3) of the stream go to the two registers in turn. So the first byte after a weight's
// own window byte, `high`, is the window byte of a weight in the other register: two extractions serve three.
//
//   k = 1, 2   1 gather, 3 extractions, 4 hashes, 2 xor, 2 look-ups                        = 12 for 128 weights
//   k = 3, 4   the same, and 2 for the sign of each register (tables of more than 64 entries are odd) = 16
#pragma once
#include <immintrin.h>

#include "weights/trellis/kernel.h"

namespace bitfold {
namespace BITFOLD_NS {

// The constants of a code: load once, keep in registers.
struct TileCode {
  __m512i low, high;       // hash matrices of the window's low byte, and of the byte k * turn bits further
  __m512i table0, table1;  // values of 64 or 128 indices; index bit 7 is the sign where there are more
};

// Position in bits, within what a lane holds, of the window of byte e of a register.
template <int K>
struct TileLayout {
  static constexpr int kTurn = K == 3 ? 2 : 8 / K;
  static constexpr bool kSigned = K >= 3;
  alignas(64) uint8_t gather[64], shift0[64], shift1[64], next[64];
  constexpr TileLayout() : gather(), shift0(), shift1(), next() {
    for (int e = 0; e < 64; ++e) {
      const int lane = e / 8, j = e % 8, first = j / kTurn * 2 * kTurn + j % kTurn;
      gather[e] = static_cast<uint8_t>((lane * 2 * K + (K == 4) + j) % (16 * K));
      shift0[e] = static_cast<uint8_t>(first * K);
      shift1[e] = static_cast<uint8_t>((first + kTurn) * K - (K == 4 ? 8 : 0));
      next[e] = static_cast<uint8_t>((e + kTurn) % 64);
    }
  }
};

template <int K>
struct Tile {
  static constexpr TileLayout<K> kLayout{};

  static BITFOLD_INLINE __m512i load(const uint8_t* tile) {
    if constexpr (K == 4) return _mm512_loadu_si512(tile);
    if constexpr (K == 3) return _mm512_maskz_loadu_epi8(~uint64_t{0} >> 16, tile);
    if constexpr (K == 2) return _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(tile)));
    return _mm512_castsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i*>(tile)));
  }

  static BITFOLD_INLINE __m512i look_up(const TileCode& code, __m512i low, __m512i high) {
    const __m512i index = _mm512_xor_si512(_mm512_gf2p8affine_epi64_epi8(low, code.low, 0),
                                           _mm512_gf2p8affine_epi64_epi8(high, code.high, 0));
    if constexpr (K <= 2) return _mm512_permutexvar_epi8(index, code.table0);
    const __m512i size = K == 3 ? _mm512_permutexvar_epi8(index, code.table0)
                                : _mm512_permutex2var_epi8(code.table0, index, code.table1);
    return _mm512_mask_sub_epi8(size, _mm512_movepi8_mask(index), _mm512_setzero_si512(), size);
  }

  // values: rows 0..15 and rows 16..31.
  static BITFOLD_INLINE void decode(const TileCode& code, const uint8_t* tile, __m512i (&values)[2]) {
    const __m512i bytes = load(tile);
    const __m512i lanes = _mm512_permutexvar_epi8(_mm512_load_si512(kLayout.gather), bytes);
    const __m512i low0 = _mm512_multishift_epi64_epi8(_mm512_load_si512(kLayout.shift0), K == 4 ? bytes : lanes);
    const __m512i low1 = _mm512_multishift_epi64_epi8(_mm512_load_si512(kLayout.shift1), lanes);
    const __m512i high1 = _mm512_permutexvar_epi8(_mm512_load_si512(kLayout.next), low0);
    values[0] = look_up(code, low0, low1);
    values[1] = look_up(code, low1, high1);
  }
};

// A matrix for vgf2p8affineqb: bit i of the result is the parity of byte 7 - i of the matrix and the operand.
static inline __m512i hash_matrix(const uint8_t (&columns)[8]) {
  uint64_t matrix = 0;
  for (int i = 0; i < 8; ++i)
    for (int j = 0; j < 8; ++j) matrix |= uint64_t{columns[j] >> i & 1u} << (8 * (7 - i) + j);
  return _mm512_set1_epi64(static_cast<long long>(matrix));
}

// Valid for tables of at most 64 (k = 1, 2), 128 (k = 3) and 256 (k = 4) entries, and windows of at most 16 bits (14
// for k = 3). Tables with more than 64 (128) entries are folded: where the highest index bit is set, the value is minus
// that of the complement, and to complement the other bits is linear, so it is part of the hash.
// `offset` (0 or 128) is added to every value.
static inline TileCode tile_code(const TrellisCode& code, int offset = 0) {
  const int w = code.index_bits, folded = code.bits == 3 ? 6 : code.bits == 4 ? 7 : w;
  const int second = code.bits == 3 ? 6 : 8;
  uint8_t columns[2][8] = {};
  for (int i = 0; i < code.window; ++i) {
    uint8_t c = code.columns[i];
    if (w > folded && c >> folded & 1) c = static_cast<uint8_t>((c ^ ((1 << folded) - 1)) & ((1 << folded) - 1)) | 0x80;
    columns[i >= 8][(i < 8 ? i : i - second) & 7] = c;
  }
  alignas(64) int8_t table[128] = {};
  for (int i = 0; i < 128; ++i)
    table[i] = static_cast<int8_t>(code.levels[i & ((1 << (w < folded ? w : folded)) - 1)] / 16 + offset);
  return {hash_matrix(columns[0]), hash_matrix(columns[1]), _mm512_load_si512(table), _mm512_load_si512(table + 64)};
}

}  // namespace BITFOLD_NS
}  // namespace bitfold
