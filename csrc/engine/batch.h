// Several tokens of one text at once: every weight is read once for all of them.
#pragma once
#include <vector>

#include "engine/decoder.h"

namespace bitfold {
namespace engine {

// Memory for `most` tokens, kept from chunk to chunk.
struct Decoder::Batch {
  explicit Batch(const Plan& plan, size_t most);
  std::vector<float> x, h, basis, y, seen;
};

}  // namespace engine
}  // namespace bitfold
