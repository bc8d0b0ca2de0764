#include "weights/dense/packing.h"

#include <atomic>
#include <cstring>

#include "system/dispatch.h"
#include "system/threads.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace bitfold {
namespace {

constexpr size_t kGrain = 1 << 17;  // codes below which a thread is not worth waking

// One row whose length need not be a multiple of 8: whole groups in place, the rest through a group of its own.
uint8_t pack_row(const Table& t, const uint8_t* codes, size_t length, int bits, uint8_t* out) {
  const size_t groups = length / 8, rest = length % 8;
  uint8_t seen = t.pack(codes, groups, bits, out);
  if (rest) {
    uint8_t last[8] = {}, bytes[8];
    std::memcpy(last, codes + 8 * groups, rest);
    seen |= t.pack(last, 1, bits, bytes);
    std::memcpy(out + groups * static_cast<size_t>(bits), bytes, packed_row_bytes(rest, bits));
  }
  return seen;
}

void unpack_one(const Table& t, const uint8_t* packed, size_t length, int bits, uint8_t* out) {
  const size_t groups = length / 8, rest = length % 8;
  t.unpack(packed, groups, bits, out);
  if (rest) {
    uint8_t bytes[8] = {}, last[8];
    std::memcpy(bytes, packed + groups * static_cast<size_t>(bits), packed_row_bytes(rest, bits));
    t.unpack(bytes, 1, bits, last);
    std::memcpy(out + 8 * groups, last, rest);
  }
}

// Large outputs are fresh memory, and one page fault for each 4 KB of it costs more than the packing itself.
void expect_to_fill([[maybe_unused]] uint8_t* out, [[maybe_unused]] size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr size_t kHuge = 1 << 21;
  const size_t first = (reinterpret_cast<uintptr_t>(out) + kHuge - 1) / kHuge * kHuge;
  const size_t last = (reinterpret_cast<uintptr_t>(out) + bytes) / kHuge * kHuge;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace

uint8_t pack(const uint8_t* codes, size_t rows, size_t length, int bits, uint8_t* out, int threads) {
  const Table& t = table();
  expect_to_fill(out, rows * packed_row_bytes(length, bits));
  std::atomic<unsigned> seen{0};
  if (length % 8 == 0) {  // no padding: all rows are one
    parallel_for(rows * length / 8, kGrain / 8, threads, [&](size_t begin, size_t end) {
      seen |= t.pack(codes + 8 * begin, end - begin, bits, out + begin * static_cast<size_t>(bits));
    });
  } else {
    const size_t bytes = packed_row_bytes(length, bits);
    parallel_for(rows, kGrain / length + 1, threads, [&](size_t begin, size_t end) {
      uint8_t mine = 0;
      for (size_t r = begin; r < end; ++r) mine |= pack_row(t, codes + r * length, length, bits, out + r * bytes);
      seen |= mine;
    });
  }
  return static_cast<uint8_t>(seen.load());
}

void unpack(const uint8_t* packed, size_t rows, size_t length, int bits, uint8_t* out, int threads) {
  const Table& t = table();
  expect_to_fill(out, rows * length);
  if (length % 8 == 0) {
    parallel_for(rows * length / 8, kGrain / 8, threads, [&](size_t begin, size_t end) {
      t.unpack(packed + begin * static_cast<size_t>(bits), end - begin, bits, out + 8 * begin);
    });
  } else {
    const size_t bytes = packed_row_bytes(length, bits);
    parallel_for(rows, kGrain / length + 1, threads, [&](size_t begin, size_t end) {
      for (size_t r = begin; r < end; ++r) unpack_one(t, packed + r * bytes, length, bits, out + r * length);
    });
  }
}

void unpack_row(const uint8_t* packed, size_t length, int bits, uint8_t* out) {
  unpack_one(table(), packed, length, bits, out);
}

}  // namespace bitfold
