// Keys and values of some sequences, allocated once; pages that nobody wrote cost nothing.
#pragma once
#include <cstdlib>
#include <memory>
#include <vector>

#include "engine/plan.h"

namespace bitfold {
namespace engine {

constexpr size_t kMostTokens = 256;  // at a time: the rows that one panel of a weight serves

class Cache {
 public:
  // Throws std::bad_alloc.
  Cache(const Plan& plan, size_t sequences, CacheKind kind);

  void store_key(size_t sequence, size_t layer, size_t head, size_t position, const float* key);
  void store_value(size_t sequence, size_t layer, size_t head, size_t position, const float* value);
  // Where a head's keys and values are.
  void show(size_t sequence, size_t layer, size_t head, Attend& attend) const;

  // The first `count` positions of one sequence into another, or into memory of `bytes(count)` and back. What a layer
  // with a window has forgotten is not among them.
  void copy(size_t from, size_t to, size_t count);
  void save(size_t sequence, size_t count, uint8_t* out) const;
  void load(size_t sequence, size_t count, const uint8_t* in);
  size_t bytes(size_t count) const;

  // Whether it keeps whole numbers.
  bool whole() const { return kind_ == CacheKind::kInt8 || kind_ == CacheKind::kInt4; }
  size_t bytes() const { return sequences_ * sequence_bytes_; }
  // By how many tokens a text may be shortened, so that what the windows of its end saw is still there.
  size_t slack() const { return slack_; }

 private:
  // One layer's heads: for each, keys, values, their scales; positions go round where there is a window.
  struct Place {
    size_t offset = 0, positions = 0, head_bytes = 0;
  };
  uint8_t* at(size_t sequence, size_t layer, size_t head) const {
    const Place& p = places_[layer];
    return memory_ + sequence * sequence_bytes_ + p.offset + head * p.head_bytes;
  }
  // f(offset in a sequence, bytes) for what the first `count` positions are in.
  template <class F>
  void each_part(size_t count, const F& f) const;

  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  const CacheKind kind_;
  const size_t sequences_, heads_, dim_, row_bytes_;  // row: of one position of one head
  std::vector<Place> places_;
  size_t sequence_bytes_ = 0, slack_ = ~size_t{0};
  std::unique_ptr<void, Free> owned_;
  uint8_t* memory_ = nullptr;
};

}  // namespace engine
}  // namespace bitfold
