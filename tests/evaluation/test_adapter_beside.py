"""An adapter that lies beside a model, as trainers leave it once it is merged, is no part of what is judged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tiny_lm
from bitfold.models.model_ref import DTYPES, ModelRef

peft: Any = pytest.importorskip("peft")
IDS = torch.arange(9)[None]


@pytest.fixture(params=["with its weights", "its config alone"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Another model is named as the base of the adapter, which changes a lot."""
    folder = tiny_lm.folder(tmp_path / "m", tiny_lm.model())
    wrapped = peft.get_peft_model(tiny_lm.model(1), peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    wrapped.save_pretrained(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "no/such"}))
    if request.param != "with its weights":
        (folder / "adapter_model.safetensors").unlink()
    return folder


@pytest.mark.parametrize("dtype", DTYPES)
def test_causal(model: Path, dtype: str) -> None:
    loaded: nn.Module = ModelRef.of(model).load("AutoModelForCausalLM", DTYPES[dtype])
    found, expected = (m(IDS).logits.detach().float() for m in (loaded, tiny_lm.model()))
    assert (found - expected).norm() <= (0.05 if "16" in dtype else 1e-5) * expected.norm()


def test_encoders(model: Path) -> None:
    loaded: nn.Module = ModelRef.of(model).load("AutoModel", None)
    whole: Any = tiny_lm.model()
    found, expected = (m(IDS).last_hidden_state.detach() for m in (loaded, whole.model))
    assert (found - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("said", ["bfloat16", None])
def test_as_stored(tmp_path: Path, said: str | None) -> None:
    """What the config says, or what the tensors are where it says nothing."""
    folder = tiny_lm.folder(tmp_path / "m", tiny_lm.model().half())
    config = json.loads((folder / "config.json").read_text())
    config.pop("dtype")
    (folder / "config.json").write_text(json.dumps(config if said is None else {**config, "dtype": said}))
    loaded = ModelRef.of(folder).load("AutoModelForCausalLM", None)
    assert {p.dtype for p in loaded.parameters()} == {torch.float16 if said is None else torch.bfloat16}
