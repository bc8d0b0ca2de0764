// Vocabularies of pieces that are joined by score (SentencePiece).
#pragma once
#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

namespace bitfold {

// A way of cutting a piece: the indices of both halves, which are pieces themselves.
struct Cut {
  int32_t left, right;
};

// Every way of cutting a piece in two pieces. SentencePiece always joins the neighbours whose union scores highest; so
// these pairs, in this order, are the merges of a BPE that does as it does: by the score of the whole, highest first,
// then by the indices. `pieces` are UTF-8, no two alike.
std::vector<Cut> cuts_by_score(const std::vector<std::string_view>& pieces, const float* scores);

}  // namespace bitfold
