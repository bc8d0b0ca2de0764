// The parts of the Python module, each bound in a file of its own: names and pointers, no arithmetic.
//
// Tensors come as addresses (address.h): the Python side (formats/, transforms/, kernels/) has checked dtype, shape,
// device and contiguity, and decoding one token makes hundreds of calls, for which the DLPack handshake would cost more
// than the arithmetic. What belongs together comes as a struct, by the names of its fields.
#pragma once
#include <nanobind/nanobind.h>

void bind_dense(nanobind::module_& m);
void bind_trellis(nanobind::module_& m);
void bind_ggml(nanobind::module_& m);
void bind_lattice(nanobind::module_& m);
void bind_rounding(nanobind::module_& m);
void bind_rotation(nanobind::module_& m);
void bind_engine(nanobind::module_& m);
void bind_text(nanobind::module_& m);
