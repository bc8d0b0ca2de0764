// parallel_for over a pool of threads of our own.
//
// Not OpenMP: PyTorch's wheel ships a private copy of an OpenMP runtime, and a second one in the same process means two
// pools that spin against each other for the same cores, and a child that hangs after fork().
#pragma once
#include <cstddef>
#include <functional>

namespace bitfold {

// Calls work(begin, end) on disjoint ranges that cover [0, count), from at most `threads` threads, the caller being one
// of them, and returns when all are done. Ranges are some for each thread, as equal as can be, in units of `grain`;
// which thread gets which depends on who has time. work must not throw.
void parallel_for(size_t count, size_t grain, int threads, const std::function<void(size_t, size_t)>& work);

// Calls work(0) here and work(1) .. work(threads - 1) on threads of the pool, each once and all at the same time: they
// may wait for each other. Returns when all are done.
void run_team(int threads, const std::function<void(int)>& work);

}  // namespace bitfold
