"""optimum-quanto: absmax scales a row at 8 bits, groups below."""

from __future__ import annotations

from common import Run, linears
from optimum.quanto import QModuleMixin, freeze, qint2, qint4, qint8, quantize

run = Run.begin()
model = run.load()
names = [name for name, _ in linears(model)]
quantize(model, weights={8: qint8, 4: qint4, 2: qint2}[run.options.bits], include=names)
freeze(model)
weights = {}
for name in names:
    layer = model.get_submodule(name)
    assert isinstance(layer, QModuleMixin)
    weights[name] = layer.weight.dequantize().float()
    w = layer.weight
    parts = [w._data._data if hasattr(w._data, "_data") else w._data, w._scale.half()]
    parts += [w._shift.half()] if hasattr(w, "_shift") else []
    run.stored(parts, weights[name].numel())
run.finish(weights)
