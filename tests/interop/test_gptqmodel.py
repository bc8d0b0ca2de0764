"""GPTQModel's own loader and kernels on what is written as GPTQ and AWQ: the same logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import bitfold
import tiny_lm
from interop_engines import IDS, model, python_of, run, same

WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "v1, 4 bits": ("gptq", {"bits": 4, "group_size": 32}),
    "v1, 8 bits": ("gptq", {"bits": 8}),
    "v1, 3 bits": ("gptq", {"bits": 3, "group_size": 32}),
    "v1, 2 bits": ("gptq", {"bits": 2, "group_size": 32}),
    "v2, zero points": ("gptq", {"format": "int4-asym-g32"}),
    "awq": ("awq", {"bits": 4, "group_size": 32}),
}
ASK = """
import json, sys
asked = json.loads(sys.argv[1])
import torch
from gptqmodel import BACKEND, GPTQModel
backend = BACKEND.TORCH_AWQ if asked["awq"] and hasattr(BACKEND, "TORCH_AWQ") else BACKEND.TORCH
model = GPTQModel.load(asked["folder"], backend=backend, device="cpu", dtype=torch.float16).model.eval()
kinds = sorted({type(m).__name__ for m in model.modules()})
with torch.no_grad():
    logits = model(torch.tensor([asked["ids"]])).logits[0].float().log_softmax(-1)
json.dump({"logits": logits.tolist(), "kinds": kinds}, open(asked["out"], "w"))
"""


@pytest.mark.parametrize("way", WAYS)
def test_logits(tmp_path: Path, way: str) -> None:
    python, (kind, said) = python_of("gptqmodel"), WAYS[way]
    source = model(tmp_path / "m")
    tiny_lm.tokenizer().save_pretrained(source)  # GPTQModel wants one
    bitfold.quantize(source, tmp_path / "q", export=kind, method="rtn", **said)
    settings = {"folder": str(tmp_path / "q"), "ids": IDS, "awq": kind == "awq"}
    found = run(python, ASK, settings, tmp_path)
    assert any("Linear" in name and name != "Linear" for name in found["kinds"]), found["kinds"]
    same(found["logits"], tmp_path / "q", "float16")
