"""Token ids beyond the embedding and rows beyond a tensor: refused in words, never read from what lies beside."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

import tiny_lm
from bitfold.calibration.options import Calibration
from bitfold.checkpoints import open_source
from bitfold.checkpoints.gguf.source import GgufSource
from bitfold.engine import Sampling, Writer
from bitfold.errors import ModelError, UsageError
from bitfold.evaluation import embedding_cosine, evaluate
from bitfold.evaluation.layers import layer_errors
from bitfold.evaluation.outliers import find_outliers
from bitfold.formats import FORMATS
from bitfold.methods.quantize import quantize_tensor
from bitfold.models.vocabulary import refuse_unknown_tokens
from bitfold.nn import QEmbedding
from bitfold.run.driver import quantize
from gguf_files import LLAMA, llama_tensors, write_gguf

ROWS = 200  # of an embedding; the tokenizer has 257 tokens, and letters beyond 200 are in the text


def model() -> Any:
    config = tiny_lm.model().config
    config.vocab_size, config.eos_token_id, config.pad_token_id = ROWS, 199, 199
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer has tokens that it was not resized for."""
    path = tiny_lm.folder(tmp_path_factory.mktemp("small"), model())
    (path / "text.txt").write_text(tiny_lm.TEXT, encoding="utf-8")
    return path


SIZES: dict[str, Any] = {"context": 64, "max_tokens": 128}
USES: dict[str, Callable[[Path, Path], Any]] = {
    "eval": lambda folder, _: evaluate(folder, None, tiny_lm.TEXT, **SIZES),
    "eval of a reference": lambda folder, _: evaluate(folder, folder, tiny_lm.TEXT, **SIZES),
    "eval of modules": lambda _folder, _: evaluate(
        model(), model(), tiny_lm.TEXT, tokenizer=tiny_lm.tokenizer(), **SIZES
    ),
    "outliers": lambda folder, _: find_outliers(folder, tiny_lm.TEXT, **SIZES),
    "generate": lambda folder, _: Writer.open(folder).write(tiny_lm.TEXT[:40], Sampling(4)),
    "calibration": lambda folder, out: quantize(
        folder, out, format="int4", method="gptq", calibration=Calibration(str(folder / "text.txt"), 2, 48)
    ),
    "token weights": lambda folder, out: quantize(
        folder, out, format="int4", method="gptq", calibration=Calibration(str(folder / "text.txt"), 2, 48, fisher=True)
    ),
    "embeddings": lambda folder, _: embedding_cosine(folder, folder, tiny_lm.TEXT.splitlines()),
}


@pytest.mark.parametrize("use", USES)
def test_tokens_that_have_no_row(folder: Path, tmp_path: Path, use: str) -> None:
    """The message has the token's number and name, and how many rows there are."""
    with pytest.raises(ModelError, match=r"token 2\d\d \(.+\) has no row in the embedding, which has 200"):
        USES[use](folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_layer_errors_of_such_tokens(folder: Path, tmp_path: Path) -> None:
    """The quantized folder is sound; the text is not for it."""
    quantize(folder, tmp_path / "out", format="int4")
    with pytest.raises(ModelError, match="has no row in the embedding, which has 200"):
        layer_errors(tmp_path / "out", folder, tiny_lm.TEXT, context=64, max_tokens=128)


def test_negative_ids_and_models_without_a_table() -> None:
    """The last row is not the one before the first; a model that hides its embedding is not judged."""
    refuse_unknown_tokens(model(), torch.tensor([0, ROWS - 1]))
    with pytest.raises(ModelError, match="token -1 has no row"):
        refuse_unknown_tokens(model(), torch.tensor([[3, -1]]))
    refuse_unknown_tokens(torch.nn.Linear(2, 2), torch.tensor([10**6]))


@pytest.mark.parametrize("index", [-1, 64, 95])
@pytest.mark.parametrize("name", FORMATS)
def test_rows_that_a_weight_does_not_have(name: str, index: int) -> None:
    """Not even those up to the end of a tile."""
    generator = torch.Generator().manual_seed(0)
    try:
        q = quantize_tensor(torch.randn(64, 256, generator=generator), name)
    except UsageError:
        pytest.skip("needs calibration")
    assert torch.equal(q.rows(torch.tensor([63])), q.dequantize()[63:])
    with pytest.raises(UsageError, match=f"has no row {index}, it has 64"):
        q.rows(torch.tensor([0, index]))
    with pytest.raises(UsageError, match=f"the embedding: has no row {index}, it has 64"):
        QEmbedding(q)(torch.tensor([[index, 1]]))


@pytest.mark.parametrize("index", [-1, 257, 10**9])
def test_rows_that_a_file_does_not_have(tmp_path: Path, index: int) -> None:
    """Of safetensors and of GGUF, which read the bytes at a row's place."""
    tiny_lm.folder(tmp_path / "folder", tiny_lm.model())
    source: Any = open_source(tmp_path / "folder")
    name = "model.embed_tokens.weight"
    assert torch.equal(source.read_rows(name, torch.tensor([0, 256])), source.read(name)[[0, 256]])
    with pytest.raises(UsageError, match=f"{name}: has no row {index}, it has 257"):
        source.read_rows(name, torch.tensor([0, index]))
    pytest.importorskip("gguf", reason="the gguf package (dev extra) writes the files")
    kinds = {"token_embd.weight": "q8_0", "blk.0.ffn_up.weight": "f16"}
    file = GgufSource(write_gguf(tmp_path / "a.gguf", "llama", llama_tensors(), LLAMA, types=kinds))
    for stored in (name, "model.layers.0.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight"):
        rows = file.info(stored).shape[0]
        with pytest.raises(UsageError, match=f"has no row {index}, it has {rows}"):
            file.read_rows(stored, torch.tensor([0, index]))
