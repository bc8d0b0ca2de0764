// Keys and values of all positions of some sequences, bfloat16, allocated once; pages that nobody wrote cost nothing.
#pragma once
#include <cstdlib>
#include <memory>

#include "engine/plan.h"

namespace bitfold {
namespace engine {

class Cache {
 public:
  // Throws std::bad_alloc.
  Cache(const Plan& plan, size_t sequences);

  // Of one head: see vector.h for their arrangement.
  const uint16_t* keys(size_t sequence, size_t layer, size_t head) const { return at(sequence, layer, head); }
  const uint16_t* values(size_t sequence, size_t layer, size_t head) const {
    return at(sequence, layer, head) + positions_ * dim_;
  }
  void store_key(size_t sequence, size_t layer, size_t head, size_t position, const float* key);
  void store_value(size_t sequence, size_t layer, size_t head, size_t position, const float* value);
  // The first `count` positions of one sequence into another.
  void copy(size_t from, size_t to, size_t count);

  size_t bytes() const { return 2 * numbers_; }

 private:
  uint16_t* at(size_t sequence, size_t layer, size_t head) const {
    return memory_.get() + ((sequence * layers_ + layer) * heads_ + head) * 2 * positions_ * dim_;
  }

  struct Free {
    void operator()(uint16_t* p) const { std::free(p); }
  };
  const size_t layers_, heads_, positions_, dim_, numbers_;
  const std::unique_ptr<uint16_t[], Free> memory_;
};

}  // namespace engine
}  // namespace bitfold
