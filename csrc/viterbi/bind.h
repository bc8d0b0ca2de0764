// Python names of the trellis encoder; see csrc/bind.cpp for how tensors come.
#pragma once
#include <nanobind/nanobind.h>

void bind_viterbi(nanobind::module_& m);
