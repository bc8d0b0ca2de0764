#include "engine/cache.h"

#include <algorithm>
#include <cstring>
#include <new>

namespace bitfold {
namespace engine {
namespace {

uint16_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Zeros: what is behind the end of a text is read, and must be numbers.
uint16_t* zeros(size_t count) {
  void* p = std::calloc(count ? count : 1, sizeof(uint16_t));
  if (!p) throw std::bad_alloc();
  return static_cast<uint16_t*>(p);
}

}  // namespace

Cache::Cache(const Plan& plan, size_t sequences)
    : layers_(plan.layers.size()),
      heads_(plan.kv_heads),
      positions_((plan.positions + kPiece - 1) / kPiece * kPiece),
      dim_(plan.dim),
      numbers_(sequences * layers_ * heads_ * 2 * positions_ * dim_),
      memory_(zeros(numbers_)) {}

void Cache::store_key(size_t sequence, size_t layer, size_t head, size_t position, const float* key) {
  uint16_t* k = at(sequence, layer, head) + position / kKeyBlock * dim_ * kKeyBlock + position % kKeyBlock;
  for (size_t d = 0; d < dim_; ++d) k[d * kKeyBlock] = to_bf16(key[d]);
}

void Cache::store_value(size_t sequence, size_t layer, size_t head, size_t position, const float* value) {
  uint16_t* v = at(sequence, layer, head) + (positions_ + position) * dim_;
  for (size_t d = 0; d < dim_; ++d) v[d] = to_bf16(value[d]);
}

void Cache::copy(size_t from, size_t to, size_t count) {
  const size_t whole = (count + kKeyBlock - 1) / kKeyBlock * kKeyBlock;
  for (size_t layer = 0; layer < layers_; ++layer)
    for (size_t head = 0; head < heads_; ++head) {
      const uint16_t* source = at(from, layer, head);
      uint16_t* target = at(to, layer, head);
      std::memcpy(target, source, whole * dim_ * sizeof(uint16_t));
      std::memcpy(target + positions_ * dim_, source + positions_ * dim_, count * dim_ * sizeof(uint16_t));
    }
}

}  // namespace engine
}  // namespace bitfold
