// Vocabularies of pieces that are joined by score (SentencePiece).
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace bitfold {

// Every way of cutting a piece in two pieces, as indices: left, right, left, right ... SentencePiece always joins the
// neighbours whose union scores highest; so these pairs, in this order, are the merges of a BPE that does as it does:
// by the score of the whole, highest first, then by the indices. `pieces` are UTF-8, no two alike.
std::vector<int32_t> cuts_by_score(const std::vector<std::string>& pieces, const float* scores);

}  // namespace bitfold
