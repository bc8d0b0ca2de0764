// The parts of the Python module, each bound in a file of its own.
#pragma once
#include <nanobind/nanobind.h>

void bind_trellis(nanobind::module_& m);
void bind_lattice(nanobind::module_& m);
