#include "text/pieces.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace bitfold {

namespace {

constexpr uint64_t kBase = 0x9E3779B97F4A7C15;  // odd; hashes are polynomials in it, modulo 2^64

// Pieces by a hash that both halves of a piece have as well without being read again: that of bytes 0..n times a power,
// taken from that of bytes 0..m, is that of bytes n..m.
class Places {
 public:
  explicit Places(const std::vector<std::string_view>& pieces) : pieces_(pieces) {
    size_t size = 16;
    while (size < 2 * pieces.size()) size *= 2;
    mask_ = size - 1;
    slots_.assign(size, -1);
    for (size_t i = 0; i < pieces.size(); ++i) {
      uint64_t hash = 0;
      for (const char c : pieces[i]) hash = hash * kBase + static_cast<unsigned char>(c) + 1;
      size_t slot = start(hash);
      while (slots_[slot] >= 0) slot = (slot + 1) & mask_;
      slots_[slot] = static_cast<int32_t>(i);
    }
  }

  // Of the piece that equals `text`, or -1.
  int32_t find(std::string_view text, uint64_t hash) const {
    for (size_t slot = start(hash);; slot = (slot + 1) & mask_) {
      const int32_t i = slots_[slot];
      if (i < 0 || pieces_[i] == text) return i;
    }
  }

 private:
  size_t start(uint64_t hash) const { return (hash ^ (hash >> 29)) * kBase >> 32 & mask_; }

  const std::vector<std::string_view>& pieces_;
  size_t mask_;
  std::vector<int32_t> slots_;
};

// Appends the ways of cutting one piece.
void cut(std::string_view piece, const Places& places, std::vector<uint64_t>& hashes, std::vector<uint64_t>& powers,
         std::vector<Cut>& cuts) {
  const size_t n = piece.size();
  hashes.resize(n + 1);
  while (powers.size() <= n) powers.push_back(powers.back() * kBase);
  for (size_t i = 0; i < n; ++i) hashes[i + 1] = hashes[i] * kBase + static_cast<unsigned char>(piece[i]) + 1;
  for (size_t at = 1; at < n; ++at) {
    if ((static_cast<unsigned char>(piece[at]) & 0xC0) == 0x80) continue;  // within a character
    const int32_t left = places.find(piece.substr(0, at), hashes[at]);
    if (left < 0) continue;
    const int32_t right = places.find(piece.substr(at), hashes[n] - hashes[at] * powers[n - at]);
    if (right >= 0) cuts.push_back({left, right});
  }
}

}  // namespace

std::vector<Cut> cuts_by_score(const std::vector<std::string_view>& pieces, const float* scores) {
  const Places places(pieces);
  std::vector<float> values(scores, scores + pieces.size());
  for (float& value : values) value = std::isnan(value) ? -INFINITY : value;  // sorting wants an order
  std::vector<int32_t> order(pieces.size());
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return values[a] > values[b]; });
  std::vector<uint64_t> hashes(1, 0), powers(1, 1);
  std::vector<Cut> cuts;
  for (size_t begin = 0; begin < order.size();) {
    const float score = values[order[begin]];
    const size_t first = cuts.size();
    for (; begin < order.size() && values[order[begin]] == score; ++begin)
      cut(pieces[order[begin]], places, hashes, powers, cuts);
    std::sort(cuts.begin() + first, cuts.end(),
              [](const Cut& a, const Cut& b) { return a.left != b.left ? a.left < b.left : a.right < b.right; });
  }
  return cuts;
}

}  // namespace bitfold
