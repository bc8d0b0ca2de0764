// Trellis tiles: 128 weights (32 rows x 4 columns) in 128 * k bits. The format is specified in docs/trellis.md.
#pragma once
#include "weights/trellis/kernel.h"

namespace bitfold {

constexpr int kTileWeights = 128;

// Whether the code's numbers are in range and fit together: what every function below counts on.
bool trellis_valid(const TrellisCode& code);

// Encodes tiles of 128 weights, given as float in units of the table's step (weight / row scale), in the order of the
// tile (row by row, 32 rows x 4 columns), so that the squared error is least; NaN = any value will do. Writes 16 * k
// bytes for each tile and, if `values` is not null, the table values. The result does not depend on the number of
// threads nor on the instruction set. `thorough` takes half as long again and finds paths with about 0.7 % less error.
// False if the code's numbers are out of range or memory is short.
bool trellis_encode(const TrellisCode& code, const float* x, size_t tiles, uint8_t* bytes, int8_t* values,
                    bool thorough, int threads);

// Table values (tiles, 128) of encoded tiles, in the order of the tile. False if the code's numbers are out of range.
bool trellis_decode(const TrellisCode& code, const uint8_t* bytes, size_t tiles, int8_t* values, int threads);

// Position in the tile of weight t of the stream.
int trellis_position(int bits, int t);

}  // namespace bitfold
