"""Other programs, each in an environment of its own that BITFOLD_INTEROP_<ENGINE> names (the path of its Python)."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

import bitfold

SOURCES = Path(bitfold.__file__).parents[1]
# A few words of vocabulary, and widths that all engines' kernels take: multiples of 32.
SIZES: dict[str, Any] = {
    "vocab_size": 288, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.08, "tie_word_embeddings": False,
}  # fmt: skip
IDS = [int(i) for i in torch.randint(0, 256, (40,), generator=torch.Generator().manual_seed(1))]
# What one product in such a dtype loses, relative to its largest term.
UNIT = {"float32": 2.0**-24, "bfloat16": 2.0**-9, "float16": 2.0**-11}


def python_of(engine: str) -> str:
    """The interpreter of an engine; the test is skipped, with what is missing, where there is none."""
    name = f"BITFOLD_INTEROP_{engine.upper().replace('-', '_')}"
    found = os.environ.get(name, "")
    if not found:
        pytest.skip(f"{name} names no Python with {engine}")
    if not Path(found).is_file():
        pytest.skip(f"{name}={found}: no such file")
    return found


def model(path: Path, family: str = "llama", **more: Any) -> Path:
    """A small random model in bfloat16."""
    torch.manual_seed(0)
    config = hf.AutoConfig.for_model(family, **{**SIZES, **more})
    made = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    made.to(torch.bfloat16).save_pretrained(path)
    return path


def log_probabilities(folder: Path, dtype: str = "float32") -> torch.Tensor:
    """(tokens, vocabulary) of IDS, by bitfold's own reader of the folder."""
    loaded: Any = bitfold.load(folder, dtype=getattr(torch, dtype))
    with torch.no_grad():
        logits: torch.Tensor = loaded(torch.tensor([IDS])).logits[0]
    return logits.float().log_softmax(-1)


def tolerance(dtype: str, layers: int = 2) -> float:
    """How far log-probabilities of two programs that compute in a dtype may lie apart.

    Some ten roundings on the residual stream of each layer, each relative to values of about the size of the logits
    (below 8 here), add up as independent errors do; four times their deviation, twice since both are off.
    """
    return 2 * 4 * 8 * UNIT[dtype] * (10.0 * layers) ** 0.5


def run(python: str, program: str, settings: Mapping[str, Any], place: Path, **environment: str) -> dict[str, Any]:
    """What a program of an engine's own Python writes as JSON: it gets `settings`, and `out` to write to."""
    out = place / "answer.json"
    asked = json.dumps({**settings, "out": str(out)})
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1", **environment}
    done = subprocess.run(
        [python, "-c", program, asked], env=env, capture_output=True, text=True, check=False, timeout=900
    )
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
    found: dict[str, Any] = json.loads(out.read_text())
    return found


TRANSFORMERS = """
import json, sys
asked = json.loads(sys.argv[1])
import torch
{imports}
from transformers import AutoModelForCausalLM
dtype = getattr(torch, asked["dtype"])
model = AutoModelForCausalLM.from_pretrained(asked["folder"], dtype=dtype, device_map="cpu").eval()
kinds = sorted({{type(m).__name__ for m in model.modules()}})
with torch.no_grad():
    logits = model(torch.tensor([asked["ids"]])).logits[0].float().log_softmax(-1)
json.dump({{"logits": logits.tolist(), "kinds": kinds}}, open(asked["out"], "w"))
"""


def in_transformers(
    python: str, folder: Path, place: Path, *, imports: str = "", dtype: str = "float32"
) -> dict[str, Any]:
    """Log-probabilities of IDS, and the classes of the model's modules, by transformers with an engine's kernels."""
    settings = {"folder": str(folder), "ids": IDS, "dtype": dtype}
    return run(python, TRANSFORMERS.format(imports=imports), settings, place)


def same(found: list[list[float]], folder: Path, dtype: str = "float32") -> None:
    """That log-probabilities are those of bitfold's reader, in float32, up to the engine's dtype."""
    expected = log_probabilities(folder)
    off = float((torch.tensor(found) - expected).abs().max())
    assert off <= tolerance(dtype), f"off by {off}, {tolerance(dtype)} is what {dtype} may lose"
