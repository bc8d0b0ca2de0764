// The table of functions that each instruction set fills in, and nothing else.
//
// A file of csrc/isa is compiled with flags that the other files lack. Whatever it instantiates with external (weak)
// linkage could be picked by the linker for code that runs on a smaller CPU, so those files include no C++ standard
// headers with inline functions, and everything they define lives in a namespace of their own (BITFOLD_NS).
#pragma once
#include <cstddef>
#include <cstdint>

namespace bitfold {

struct Table {
  const char* name;

  // Packs `groups` groups of 8 codes (one byte each) into `bits` bytes each. Returns the bitwise or of all codes, so
  // that the caller sees whether any was too large; what is written is then meaningless. bits in 1..8.
  uint8_t (*pack)(const uint8_t* codes, size_t groups, int bits, uint8_t* out);

  // The inverse: `groups` groups of `bits` bytes into 8 codes each.
  void (*unpack)(const uint8_t* packed, size_t groups, int bits, uint8_t* out);
};

}  // namespace bitfold
