#include "engine/cache.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>

namespace bitfold {
namespace engine {
namespace {

constexpr size_t kAlign = 64;

size_t pieces(size_t positions) { return (positions + kPiece - 1) / kPiece * kPiece; }

uint16_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Half precision, the largest where it has no number so large.
uint16_t to_f16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x477fe000) return static_cast<uint16_t>(sign | (bits > 0x7f800000 ? 0x7e00 : 0x7bff));  // NaN stays NaN
  if (bits < 0x38800000) {  // below its normal numbers: added to 1/2, the last place is worth 2^-24
    float small;
    std::memcpy(&small, &bits, 4);
    small += 0.5f;
    std::memcpy(&bits, &small, 4);
    return static_cast<uint16_t>(sign | (bits - 0x3f000000));
  }
  bits += 0xfff + (bits >> 13 & 1);
  return static_cast<uint16_t>(sign | ((bits - 0x38000000) >> 13));
}

float from_bf16(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

size_t row_bytes(CacheKind kind, size_t dim) {
  return kind == CacheKind::kInt8 ? dim : kind == CacheKind::kInt4 ? dim / 2 : 2 * dim;
}

// The scale with which the largest number is the largest code, and its inverse.
float scale_of(const float* x, size_t n, float most, uint16_t* stored) {
  float top = 0;
  for (size_t i = 0; i < n; ++i) top = std::max(top, std::fabs(x[i]));
  *stored = to_bf16(top / most);
  const float scale = from_bf16(*stored);
  return scale > 0 ? 1 / scale : 0;
}

int code_of(float x, float inverse, int most) {
  return std::min(most, std::max(-most, static_cast<int>(std::lrint(x * inverse))));
}

}  // namespace

Cache::Cache(const Plan& plan, size_t sequences, CacheKind kind)
    : kind_(kind), sequences_(sequences), heads_(plan.kv_heads), dim_(plan.dim), row_bytes_(row_bytes(kind, plan.dim)) {
  const size_t all = pieces(plan.positions), scales = whole() ? 2 * sizeof(uint16_t) : 0;
  for (const Layer& layer : plan.layers) {
    Place p;
    p.offset = sequence_bytes_;
    // Room for the window of the first and the positions of all tokens that are stored at a time.
    const size_t needed = layer.window ? pieces(layer.window + kMostTokens + kPiece) : all;
    p.positions = std::min(all, needed);
    if (p.positions < all) slack_ = std::min(slack_, p.positions - layer.window - 1);
    p.head_bytes = p.positions * (2 * row_bytes_ + scales);
    sequence_bytes_ += heads_ * p.head_bytes;
    places_.push_back(p);
  }
  // Zeros: what is behind the end of a text is read, and must be numbers.
  owned_.reset(std::calloc(bytes() + kAlign, 1));
  if (!owned_) throw std::bad_alloc();
  memory_ = static_cast<uint8_t*>(owned_.get());
  memory_ += (kAlign - reinterpret_cast<uintptr_t>(memory_) % kAlign) % kAlign;
}

void Cache::show(size_t sequence, size_t layer, size_t head, Attend& a) const {
  const size_t positions = places_[layer].positions;
  const uint8_t* keys = at(sequence, layer, head);
  a.kind = kind_;
  a.positions = positions;
  a.keys = keys;
  a.values = keys + positions * row_bytes_;
  a.key_scales = reinterpret_cast<const uint16_t*>(keys + 2 * positions * row_bytes_);
  a.value_scales = a.key_scales + positions;
}

void Cache::store_key(size_t sequence, size_t layer, size_t head, size_t position, const float* key) {
  Attend a;
  show(sequence, layer, head, a);
  position %= a.positions;
  uint8_t* keys = at(sequence, layer, head) + position / kKeyBlock * kKeyBlock * row_bytes_;
  const size_t lane = position % kKeyBlock;
  if (!whole()) {
    uint16_t* k = reinterpret_cast<uint16_t*>(keys) + lane;
    for (size_t d = 0; d < dim_; ++d) k[d * kKeyBlock] = kind_ == CacheKind::kF16 ? to_f16(key[d]) : to_bf16(key[d]);
    return;
  }
  const int most = kind_ == CacheKind::kInt8 ? 127 : 7;
  const float inverse = scale_of(key, dim_, static_cast<float>(most), const_cast<uint16_t*>(a.key_scales) + position);
  if (kind_ == CacheKind::kInt8) {
    for (size_t d = 0; d < dim_; ++d) keys[d * kKeyBlock + lane] = static_cast<uint8_t>(code_of(key[d], inverse, most));
    return;
  }
  for (size_t d = 0; d < dim_; d += 2) {
    const int low = code_of(key[d], inverse, most) + 8, high = code_of(key[d + 1], inverse, most) + 8;
    keys[d / 2 * kKeyBlock + lane] = static_cast<uint8_t>(low | high << 4);
  }
}

void Cache::store_value(size_t sequence, size_t layer, size_t head, size_t position, const float* value) {
  Attend a;
  show(sequence, layer, head, a);
  position %= a.positions;
  uint8_t* v = at(sequence, layer, head) + (a.positions + position) * row_bytes_;
  if (!whole()) {
    for (size_t d = 0; d < dim_; ++d)
      reinterpret_cast<uint16_t*>(v)[d] = kind_ == CacheKind::kF16 ? to_f16(value[d]) : to_bf16(value[d]);
    return;
  }
  const int most = kind_ == CacheKind::kInt8 ? 127 : 7;
  const float inverse =
      scale_of(value, dim_, static_cast<float>(most), const_cast<uint16_t*>(a.value_scales) + position);
  if (kind_ == CacheKind::kInt8) {
    for (size_t d = 0; d < dim_; ++d) v[d] = static_cast<uint8_t>(code_of(value[d], inverse, most));
    return;
  }
  for (size_t d = 0; d < dim_; d += 2 * kKeyBlock)
    for (size_t i = 0; i < kKeyBlock; ++i) {
      const int low = code_of(value[d + i], inverse, most) + 8;
      const int high = code_of(value[d + kKeyBlock + i], inverse, most) + 8;
      v[d / 2 + i] = static_cast<uint8_t>(low | high << 4);
    }
}

template <class F>
void Cache::each_part(size_t count, const F& f) const {
  for (const Place& p : places_) {
    const size_t kept = std::min(p.positions, pieces(count));
    for (size_t head = 0; head < heads_; ++head) {
      const size_t first = p.offset + head * p.head_bytes, scales = first + 2 * p.positions * row_bytes_;
      f(first, kept * row_bytes_);
      f(first + p.positions * row_bytes_, kept * row_bytes_);
      if (!whole()) continue;
      f(scales, kept * sizeof(uint16_t));
      f(scales + p.positions * sizeof(uint16_t), kept * sizeof(uint16_t));
    }
  }
}

void Cache::copy(size_t from, size_t to, size_t count) {
  const uint8_t* source = memory_ + from * sequence_bytes_;
  uint8_t* target = memory_ + to * sequence_bytes_;
  each_part(count, [&](size_t at, size_t size) { std::memcpy(target + at, source + at, size); });
}

void Cache::save(size_t sequence, size_t count, uint8_t* out) const {
  const uint8_t* source = memory_ + sequence * sequence_bytes_;
  each_part(count, [&](size_t at, size_t size) {
    std::memcpy(out, source + at, size);
    out += size;
  });
}

void Cache::load(size_t sequence, size_t count, const uint8_t* in) {
  uint8_t* target = memory_ + sequence * sequence_bytes_;
  each_part(count, [&](size_t at, size_t size) {
    std::memcpy(target + at, in, size);
    in += size;
  });
}

size_t Cache::bytes(size_t count) const {
  size_t total = 0;
  each_part(count, [&](size_t, size_t size) { total += size; });
  return total;
}

}  // namespace engine
}  // namespace bitfold
