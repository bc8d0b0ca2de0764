// What one instruction set offers to the trellis encoder: a Viterbi search over a batch of tiles, one tile a lane.
//
// Included by files that are compiled with flags of their own, so it names no C++ standard headers (see
// system/table.h).
#pragma once
#include <cstddef>
#include <cstdint>

namespace bitfold {

// A sliding-window code. The value of a window s is levels[xor of columns[i] over the set bits i of s].
struct TrellisCode {
  int bits = 0;                      // k: new bits for each weight, 1..4
  int window = 0;                    // L: bits of a window, 9..16
  int index_bits = 0;                // w: the table has 2^w entries, k <= w <= 8
  int gain = 0;                      // 2..6: costs are squares of distances << gain, >> 16 (distances in 1/16 step)
  const uint8_t* columns = nullptr;  // (L)
  const int16_t* levels = nullptr;   // (2^w), in 1/16 step
};

// The memory of one search, allocated once for a thread. All arrays are aligned to 64 bytes.
struct ViterbiScratch {
  uint16_t* cost;     // 2^L * lanes
  uint16_t* local;    // kLocalStates * lanes
  uint16_t* metric;   // kMaxGroup * 2^w * lanes
  uint32_t* offsets;  // kLocalStates
  uint8_t* back;      // steps * 2^(L-k) * back_bytes(k)
};

constexpr int kLocalStates = 256;
constexpr int kMaxGroup = 8;

struct ViterbiKernel {
  const char* name;
  int lanes;
  // Bytes that the decisions of one step take for each group of 2^k states with a common successor.
  size_t (*back_bytes)(int bits);
  // Finds the cheapest path for x (steps, lanes), int16 in 1/16 step. `seam` (lanes) fixes the L - k low bits of both
  // the state before the first step and the last state; null leaves both free. Writes the states (steps, lanes) of the
  // path. steps must be a multiple of 8. Ties go to the lowest predecessor and the lowest final state.
  void (*search)(const TrellisCode& code, const ViterbiScratch& scratch, const int16_t* x, int steps,
                 const uint16_t* seam, uint16_t* path);
};

}  // namespace bitfold
