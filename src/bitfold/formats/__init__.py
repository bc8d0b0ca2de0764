"""The registry of number formats: data, not classes.

`FORMATS` lists one entry for each format people ask for by name; `get_format` also reads names with other group sizes
and scopes, and other codebooks: `int4-asym-g64`, `int3-row`, `fp8-e4m3-tensor`, `nf4-g32-dq`, `aqlm-2x6`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

from bitfold.errors import FormatError
from bitfold.formats.base import Fit, Format, Params, Scale, Store
from bitfold.formats.cast import Cast
from bitfold.formats.families.aqlm import ADDITIVE, parse_additive, read_additive
from bitfold.formats.families.e8p import E8P, read_e8p
from bitfold.formats.families.ggml import GGML
from bitfold.formats.families.trellis import TRELLIS, read_trellis
from bitfold.formats.grids import E2M1, E4M3, E5M2, E8M0, GRIDS, NF4, TERNARY, U8_SCALE, Grid, get_grid, ints, uints
from bitfold.formats.protocol import AnyFormat

__all__ = ["FORMATS", "AnyFormat", "Fit", "Format", "Params", "Scale", "get_format", "read_description"]


_ROW = (1, 0)
_TENSOR = (0, 0)
_NAME = re.compile(
    r"(?P<grid>int[1-8]|fp8-e4m3|fp8-e5m2|fp4|nf4|ternary)(?:-(?P<zero>asym|affine))?"
    r"(?:-(?P<scope>row|tensor|g[1-9][0-9]*))?(?P<dq>-dq)?"
)
_FLOAT_GRIDS = {"fp8-e4m3": E4M3, "fp8-e5m2": E5M2, "fp4": E2M1, "nf4": NF4, "ternary": TERNARY}
# NormalFloat and FP4 are group formats by birth (QLoRA: 64 weights); integers, FP8 and ternary default to rows.
_DEFAULT_SCOPE = {"nf4": "g64", "fp4": "g32"}


def _block(scope: str) -> tuple[int, int]:
    return {"row": _ROW, "tensor": _TENSOR}.get(scope) or (1, int(scope[1:]))


def _scale(block: tuple[int, int], offset: Store | None, double: bool) -> Scale:
    if double:
        # QLoRA's double quantization: 8-bit scales in blocks of 256 (here magnitudes, so no mean to subtract).
        return Scale(block, U8_SCALE, offset, Scale((1, 256), torch.float32))
    # bfloat16 keeps float32's range; codes are chosen under the rounded scale, so its short mantissa costs nothing
    # measurable. A number stored once for a tensor is cheap enough for float32.
    return Scale(block, torch.float32 if block == _TENSOR else torch.bfloat16, offset)


def _parse(name: str) -> Format | None:
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    base, zero, double = match["grid"], match["zero"], bool(match["dq"])
    scope = match["scope"] or _DEFAULT_SCOPE.get(base, "row")
    offset: Store | None = None
    if base.startswith("int"):
        bits = int(base[3:])
        if bits == 1 and zero == "asym":
            return None  # an integer zero point leaves one of the two levels at zero
        grid = uints(bits) if zero else ints(bits)
        offset = uints(bits) if zero == "asym" else torch.float16 if zero == "affine" else None
    elif zero:
        return None
    else:
        grid = _FLOAT_GRIDS[base]
    if double and (zero or not scope.startswith("g")):
        return None
    return Format(name, grid, _scale(_block(scope), offset, double))


def _entries() -> list[AnyFormat]:
    names = [f"int{b}{zero}{scope}" for b in range(8, 0, -1) for zero in ("", "-asym") for scope in ("", "-g64")]
    names += [f"int{b}-affine-g64" for b in range(8, 0, -1)] + [
        "int8-tensor",
        "int4-g32",
        "int4-g128",
        "int4-asym-g128",
    ]
    names += ["fp8-e4m3", "fp8-e4m3-tensor", "fp8-e5m2", "fp4", "nf4", "nf4-dq", "ternary", "ternary-tensor"]
    parsed = [f for f in map(_parse, names) if f is not None]
    return [
        Cast("fp32", torch.float32),
        Cast("bf16", torch.bfloat16),
        Cast("fp16", torch.float16),
        *parsed,
        # OCP microscaling formats 1.0: 32 elements share an E8M0 scale; NVFP4: 16 share an E4M3 one, and a float32.
        Format("mxfp4", E2M1, Scale((1, 32), E8M0)),
        Format("mxfp8", E4M3, Scale((1, 32), E8M0)),
        Format("mxfp8-e5m2", E5M2, Scale((1, 32), E8M0)),
        Format("nvfp4", E2M1, Scale((1, 16), _UP_E4M3, None, Scale(_TENSOR, torch.float32))),
        # Blocks of llama.cpp and its relatives; rows must be whole blocks (32 or 256 weights).
        *GGML.values(),
        # Trellis codes: for rows that are nearly normal, such as rotated ones.
        *TRELLIS.values(),
        # Lattice codes: eight weights at a time; also for rotated rows.
        *E8P.values(),
        # Additive codebooks, learned for each tensor.
        *ADDITIVE.values(),
    ]


_UP_E4M3 = Grid("e4m3-up", tuple(p if p == p and p >= 0 else float("nan") for p in E4M3.points), round="up")
GRIDS[_UP_E4M3.name] = _UP_E4M3
FORMATS: dict[str, AnyFormat] = {f.name: f for f in _entries()}
_ALIASES = {
    "bfloat16": "bf16",
    "float16": "fp16",
    "f16": "fp16",
    "float32": "fp32",
    "fp8": "fp8-e4m3",
    "int8-row": "int8",
}


def get_format(format: str | AnyFormat) -> AnyFormat:
    """The format of that name (or the object itself).

    Raises:
        FormatError: unknown name; the message lists the nearest ones.
    """
    if not isinstance(format, str):
        return format
    name = _ALIASES.get(format.lower(), format.lower())
    found = FORMATS.get(name) or _parse(name) or parse_additive(name)
    if found is None:
        from difflib import get_close_matches

        near = get_close_matches(name, FORMATS, 4, 0.5) or ["int4-asym-g64", "nf4", "int8"]
        raise FormatError(f"unknown format {format!r}", hint=f"did you mean {', '.join(near)}? see `bitfold formats`")
    return found


def scaled_by_row(format: AnyFormat) -> AnyFormat:
    """The format with one scale for each row instead of groups; itself where it has no such form."""
    return _parse(re.sub(r"(-(row|tensor|g[0-9]+))?(-dq)?$", "-row", format.name, count=1)) or format


def rows_rescale(format: AnyFormat) -> bool:
    """Whether each row of a weight can be multiplied by a factor through its scales alone, the codes as they are."""
    scale = format.scale
    whole = scale is not None and (scale.block[0] != 1 or isinstance(scale.store, Grid))
    return format.rescaled is not None and not whole


def read_description(name: str, description: Mapping[str, Any]) -> AnyFormat:
    """The format that a checkpoint describes; the description is the law, the name only a label.

    Raises:
        FormatError: a family, grid or store that this version does not know.
    """
    known = FORMATS.get(name) or _parse(name)
    if known is not None and known.describe() == dict(description):
        return known
    reader = _READERS.get(str(description.get("family")))
    if reader is None:
        raise FormatError(f"the checkpoint's format {name!r} is not known here", hint="a newer bitfold may read it")
    return reader(name, description)


def _read_grid_format(name: str, description: Mapping[str, Any]) -> Format:
    return Format(name, get_grid(str(description["grid"])), _read_scale(description["scale"]))


_READERS: dict[str, Callable[[str, Mapping[str, Any]], AnyFormat]] = {
    "grid": _read_grid_format,
    "trellis": read_trellis,
    "e8p": read_e8p,
    "additive": read_additive,
}


def _read_scale(text: Mapping[str, Any] | None) -> Scale | None:
    if text is None:
        return None
    rows, cols = text["block"]
    if type(rows) is not int or type(cols) is not int or rows < 0 or cols < 0:
        raise FormatError(f"a scale cannot have blocks of {text['block']}", hint="the checkpoint is damaged")
    store = _read_store(text["store"])
    if store is None:
        raise FormatError("a scale without a store", hint="the checkpoint is damaged")
    return Scale((rows, cols), store, _read_store(text["offset"]), _read_scale(text["of"]))


def _read_store(name: str | None) -> Store | None:
    if name is None:
        return None
    if name in ("float32", "float16", "bfloat16"):
        return {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[name]
    return get_grid(name)
