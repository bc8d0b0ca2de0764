// How fast this machine reads memory: the ceiling that decoding speed is judged by.
#pragma once
#include <cstddef>
#include <cstdint>

namespace bitfold {

// Reads `bytes` bytes once, in four streams for each thread; returns a checksum so that nothing is optimised away.
uint64_t read_memory(const uint8_t* data, size_t bytes, int threads);

}  // namespace bitfold
