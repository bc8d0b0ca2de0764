// Tensors come from Python as addresses; the caller keeps them alive.
#pragma once
#include <nanobind/nanobind.h>

#include <cstdint>

namespace nb = nanobind;
using namespace nb::literals;

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}
