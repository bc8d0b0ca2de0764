// How fast this machine reads memory and makes dot products: the ceilings that speed is judged by.
#pragma once
#include <cstddef>
#include <cstdint>

namespace bitfold {

// Reads `bytes` bytes once, in four streams for each thread; returns a checksum so that nothing is optimised away.
uint64_t read_memory(const uint8_t* data, size_t bytes, int threads);

// Dot products of four bytes that one thread makes to find out how many it can: returns their number.
size_t spin_dots(size_t rounds);

}  // namespace bitfold
