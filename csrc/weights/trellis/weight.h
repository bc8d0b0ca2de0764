// A weight as trellis tiles (docs/trellis.md) of 32 rows x 4 columns: they decode to bytes, value + 128, and every row
// has one bfloat16 scale.
#pragma once
#include "weights/scaled.h"
#include "weights/trellis/kernel.h"

namespace bitfold {

struct TrellisWeight : Scaled {
  const uint8_t* tiles = nullptr;
  size_t band_bytes = 0;  // of the tiles of 32 rows
  TrellisCode code;

  TrellisWeight() {
    bf16 = true;
    offset = 128;
  }
};

}  // namespace bitfold
