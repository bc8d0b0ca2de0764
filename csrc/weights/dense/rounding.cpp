#include "weights/dense/rounding.h"

#include "system/dispatch.h"
#include "system/threads.h"

namespace bitfold {
namespace {

constexpr size_t kGrain = 1 << 16;  // weights below which a thread is not worth waking
constexpr size_t kTogether = 64;    // weights of a column that stay together

}  // namespace

void rounding_errors(const Integers& grid, const float* w, size_t blocks, size_t length, const float* scale,
                     const float* zero, float* error, int threads) {
  const Table& t = table();
  parallel_for(blocks, kGrain / (length + 1) + 1, threads, [&](size_t begin, size_t end) {
    t.grid_errors(grid, w + begin * length, end - begin, length, scale + begin, zero ? zero + begin : nullptr,
                  error + begin);
  });
}

void rounding_feedback(const Integers& grid, const ColumnScales& scales, const Columns& columns, uint8_t* codes,
                       int threads) {
  if (!columns.count || !columns.rows) return;
  const Table& t = table();
  const size_t enough = kGrain / (columns.count * (columns.count / 2 + 8)) + 1;
  const size_t grain = (enough + kTogether - 1) / kTogether * kTogether;
  parallel_for(columns.rows, grain, threads,
               [&](size_t begin, size_t end) { t.feed(grid, scales, columns, codes, begin, end); });
}

}  // namespace bitfold
