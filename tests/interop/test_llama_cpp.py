"""llama.cpp runs the GGUF files that bitfold writes, with the logits of transformers on what they decode to.

BITFOLD_INTEROP_LLAMA_CPP names a Python with llama-cpp-python. BITFOLD_INTEROP_MODELS, folders or GGUF files with ":"
between them, adds real models in every type.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from bitfold import quantize
from bitfold.checkpoints import convert, open_source
from bitfold.checkpoints.gguf.described import describe_model
from bitfold.checkpoints.gguf.imatrix import Imatrix, Importance, write_imatrix
from bitfold.checkpoints.gguf.mixtures import names
from bitfold.checkpoints.repack import repack
from gguf_families import MIXTURES, MODELS, random_model, rebuilt
from interop_engines import python_of, run

pytestmark = pytest.mark.filterwarnings("ignore")

LOGITS = """
import ctypes, json, sys
import llama_cpp as lib
import numpy as np
asked = json.loads(sys.argv[1])
@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
def told(level, text, data):
    if level >= 4 and text:
        sys.stderr.write(text.decode(errors="replace"))
lib.llama_log_set(told, None)
lib.llama_backend_init()
model = lib.llama_model_load_from_file(asked["file"].encode(), lib.llama_model_default_params())
assert model, "cannot be loaded"
ids = asked["ids"]
params = lib.llama_context_default_params()
params.n_ctx = params.n_batch = params.n_ubatch = max(64, len(ids))
params.n_threads = params.n_threads_batch = 1
params.flash_attn_type = 0
context = lib.llama_init_from_model(model, params)
words = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
batch = lib.llama_batch_init(len(ids), 0, 1)
batch.n_tokens = len(ids)
for i, token in enumerate(ids):
    batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, 1
    batch.seq_id[i][0] = 0
assert lib.llama_decode(context, batch) == 0
logits = np.ctypeslib.as_array(lib.llama_get_logits(context), shape=(len(ids), words)).copy()
assert np.isfinite(logits).all()
np.save(asked["logits"], logits)
json.dump({"words": words}, open(asked["out"], "w"))
"""
FLOATS = ("F32", "F16", "BF16")
# Nats a token. llama.cpp multiplies with weights in half precision by activations in half precision, and with blocks by
# activations in 8 bits for every 32 or 256: about .4 % of each product.
FLOAT_NOISE, ROUNDED_INPUTS = 1e-5, 1e-3
REAL = [Path(name) for name in os.environ.get("BITFOLD_INTEROP_MODELS", "").split(":") if name]


def decoded(file: Path, place: Path) -> Any:
    """The transformers model that the file decodes to."""
    source: Any = open_source(file)
    try:
        if source.config["model_type"] not in {model_type for model_type, _ in MIXTURES.values()}:
            return rebuilt(source)
    finally:
        source.close()
    folder = convert(file, place / "decoded", "float32")  # experts one by one: transformers puts them together
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")


def divergence(file: Path, ids: list[int], place: Path) -> float:
    """Mean KL of llama.cpp's predictions from transformers' on the weights that the file decodes to."""
    with torch.no_grad():
        expected = _log_probabilities(decoded(file, place), ids)
    logits = place / "logits.npy"
    run(python_of("llama_cpp"), LOGITS, {"file": str(file), "ids": ids, "logits": str(logits)}, place)
    import numpy as np

    found = torch.from_numpy(np.load(logits)).double().log_softmax(-1)
    return float((expected.exp() * (expected - found)).sum(-1).mean())


def rounded_inputs(file: Path, ids: list[int], place: Path) -> float:
    """What llama.cpp's rounding of activations to 8 bits loses by itself: small models feel that, some thousandths of a
    nat, whatever the weights, and at a few tokens far more. Mean KL, as `divergence`.

    By this the other is judged: two draws of the same noise.
    """

    def rounded(_module: Any, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        x = inputs[0].unflatten(-1, (-1, 256 if inputs[0].shape[-1] % 256 == 0 else 32))
        step = (x.abs().amax(-1, keepdim=True) / 127).clamp_min(1e-30)
        return ((x / step).round() * step).flatten(-2)

    model = decoded(file, place / "rounded")
    with torch.no_grad():
        expected, found = (_log_probabilities(model, ids, how) for how in (None, rounded))
    return float((expected.exp() * (expected - found)).sum(-1).mean())


def _log_probabilities(model: Any, ids: list[int], before: Any = None) -> torch.Tensor:
    if before is not None:
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_pre_hook(before)
    logits: torch.Tensor = model(input_ids=torch.tensor([ids])).logits[0]
    return logits.double().log_softmax(-1)


def tokens(words: int, count: int) -> list[int]:
    return torch.randint(3, words, (count,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.mark.parametrize("family", MODELS)
def test_every_family(family: str, tmp_path: Path) -> None:
    python_of("llama_cpp")
    _, model_type, options, _ = MODELS[family]
    random_model(model_type, options).save_pretrained(tmp_path / "model")
    file = repack(tmp_path / "model", tmp_path / "m.gguf", "gguf:F32").path
    # No more tokens than its window: llama.cpp does not have the windows of Mistral and Phi-3.
    count = int(options.get("sliding_window", 24)) if family in ("mistral", "phi3") else 24
    assert divergence(file, tokens(97, count), tmp_path) < FLOAT_NOISE


@pytest.mark.parametrize("name", ["F32", "Q4_0", "Q5_K_M", "auto"])
@pytest.mark.parametrize("family", MIXTURES)
def test_mixtures_of_experts(family: str, name: str, tmp_path: Path) -> None:
    python_of("llama_cpp")
    model_type, options = MIXTURES[family]
    wider = {"hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 256}
    sizes = {key: size for key, size in wider.items() if key in options or not key.startswith("moe")}
    made = random_model(model_type, {**options, **sizes})
    with torch.no_grad():
        for p in made.parameters():
            p.mul_(0.2 if p.dim() > 1 else 1)
    made.save_pretrained(tmp_path / "model")
    if name == "auto":
        file = of_a_size(tmp_path, made)
    else:
        file = repack(tmp_path / "model", tmp_path / "m.gguf", f"gguf:{name}").path
    assert divergence(file, tokens(97, 24), tmp_path) < (FLOAT_NOISE if name in FLOATS else ROUNDED_INPUTS)


def of_a_size(place: Path, model: Any) -> Path:
    """At 4.3 bits a weight, types chosen by costs that are drawn: random words have no tokenizer to measure with."""
    known, drawn = describe_model(model.config.to_dict(), "", "").gguf_name, torch.Generator().manual_seed(1)
    costs = {
        known(name) or name: Importance(torch.ones(w.shape[-1]), torch.rand(w.shape[-1], generator=drawn))
        for name, w in model.named_parameters()
        if w.dim() > 1
    }
    write_imatrix(place / "costs.gguf", Imatrix(costs, 1))
    size: dict[str, Any] = {"target_bpw": 4.3, "imatrix": place / "costs.gguf"}
    report = quantize(place / "model", place / "m.gguf", export="gguf:auto", method="rtn", **size)
    return Path(str(report.output))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows that blocks of 256 divide."""
    python_of("llama_cpp")
    folder = tmp_path_factory.mktemp("wide") / "model"
    made = random_model("llama", {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8})
    with torch.no_grad():
        for p in made.parameters():
            p.mul_(0.2 if p.dim() > 1 else 1)
    made.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", names())
def test_every_type(name: str, wide: Path, tmp_path: Path) -> None:
    file = repack(wide, tmp_path / "m.gguf", f"gguf:{name}").path
    assert divergence(file, tokens(97, 24), tmp_path) < (FLOAT_NOISE if name in FLOATS else ROUNDED_INPUTS)


def test_files_in_parts(wide: Path, tmp_path: Path) -> None:
    file = repack(wide, tmp_path / "m.gguf", "gguf:Q4_K_M", max_shard_bytes=100_000).path
    assert len(list(tmp_path.glob("m-*-of-*.gguf"))) > 3
    assert divergence(file, tokens(97, 24), tmp_path) < ROUNDED_INPUTS


@pytest.mark.parametrize("name", ["F16", "Q8_0", "Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K", "IQ4_XS"])
@pytest.mark.parametrize("model", REAL or [None], ids=str)
def test_real_models(model: Path | None, name: str, tmp_path: Path) -> None:
    python_of("llama_cpp")
    if model is None:
        pytest.skip("BITFOLD_INTEROP_MODELS names no models")
    if not model.exists():
        pytest.skip(f"BITFOLD_INTEROP_MODELS: {model} is not there")
    file = repack(model, tmp_path / "m.gguf", f"gguf:{name}").path
    source: Any = open_source(file)
    ids = source.tokenizer()("The tower is 324 metres tall, about the same height as an 81-storey building.")[
        "input_ids"
    ]
    source.close()
    found, rounding = divergence(file, ids, tmp_path), rounded_inputs(file, ids, tmp_path)
    assert found < (1e-4 if name in FLOATS else 3 * rounding + 1e-4), f"{found}; rounding of inputs loses {rounding}"
