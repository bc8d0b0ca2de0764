// Plain C++: every CPU.
#define BITFOLD_NS scalar
#include "swar.h"
#include "table.h"

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

static uint8_t pack(const uint8_t* codes, size_t groups, int bits, uint8_t* out) {
  return with_bits<Pack>(bits, codes, groups, out);
}

static void unpack(const uint8_t* packed, size_t groups, int bits, uint8_t* out) {
  with_bits<Unpack>(bits, packed, groups, out);
}

}  // namespace scalar

extern const Table table_scalar = {"scalar", scalar::pack, scalar::unpack};

}  // namespace bitfold
