#include "transforms/rotation.h"

#include "system/dispatch.h"
#include "system/scratch.h"
#include "system/threads.h"

namespace bitfold {
namespace {

thread_local Scratch row_memory;

}  // namespace

void rotate(const Rotation& r, const float* x, size_t rows, float* out, int threads) {
  const Table& t = table();
  parallel_for(rows, 1 + (1 << 14) / (r.size + 1), threads, [&](size_t begin, size_t end) {
    float* scratch = row_memory.get<float>(r.size);
    for (size_t i = begin; i < end; ++i) t.rotate(r, x + i * r.size, out + i * r.size, scratch);
  });
}

}  // namespace bitfold
