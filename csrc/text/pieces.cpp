#include "text/pieces.h"

#include <algorithm>
#include <cmath>
#include <string_view>
#include <unordered_map>

namespace bitfold {

namespace {

struct Cut {
  float score;
  int32_t left, right;
};

bool before(const Cut& a, const Cut& b) {
  if (a.score != b.score) return a.score > b.score;
  return a.left != b.left ? a.left < b.left : a.right < b.right;
}

}  // namespace

std::vector<int32_t> cuts_by_score(const std::vector<std::string>& pieces, const float* scores) {
  std::unordered_map<std::string_view, int32_t> places(2 * pieces.size());
  for (size_t i = 0; i < pieces.size(); ++i) places.emplace(pieces[i], static_cast<int32_t>(i));
  std::vector<Cut> cuts;
  for (size_t i = 0; i < pieces.size(); ++i) {
    const std::string_view piece = pieces[i];
    const float score = std::isnan(scores[i]) ? -INFINITY : scores[i];  // sorting wants an order
    for (size_t at = 1; at < piece.size(); ++at) {
      if ((static_cast<unsigned char>(piece[at]) & 0xC0) == 0x80) continue;  // within a character
      const auto left = places.find(piece.substr(0, at));
      if (left == places.end()) continue;
      const auto right = places.find(piece.substr(at));
      if (right != places.end()) cuts.push_back({score, left->second, right->second});
    }
  }
  std::sort(cuts.begin(), cuts.end(), before);
  std::vector<int32_t> flat;
  flat.reserve(2 * cuts.size());
  for (const Cut& cut : cuts) {
    flat.push_back(cut.left);
    flat.push_back(cut.right);
  }
  return flat;
}

}  // namespace bitfold
