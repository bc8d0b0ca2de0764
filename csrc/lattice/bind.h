// Python names of lattice weights; see csrc/bind.cpp for how tensors come.
#pragma once
#include <nanobind/nanobind.h>

void bind_lattice(nanobind::module_& m);
