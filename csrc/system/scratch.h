// Memory that is kept from call to call, one piece for each thread and purpose, aligned to cache lines.
#pragma once
#include <cstddef>
#include <new>

namespace bitfold {

class Scratch {
 public:
  ~Scratch() { release(); }

  template <class T>
  T* get(size_t count) {
    const size_t bytes = count * sizeof(T);
    if (bytes > size_) {
      release();
      const size_t pages = (bytes + 4095) / 4096 * 4096;
      memory_ = ::operator new(pages, kAlign);
      size_ = pages;
    }
    return static_cast<T*>(memory_);
  }

 private:
  static constexpr std::align_val_t kAlign{64};
  void release() {
    if (memory_) ::operator delete(memory_, kAlign);
    memory_ = nullptr;
    size_ = 0;
  }
  void* memory_ = nullptr;
  size_t size_ = 0;
};

}  // namespace bitfold
