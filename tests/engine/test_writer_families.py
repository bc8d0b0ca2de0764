"""Text out of families that do not simply go on with a text: encoder-decoders, odd names, pictures wanted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from typer.testing import CliRunner

import bitfold
import tiny_lm
from bitfold.cli import app
from bitfold.engine import Sampling, Writer
from bitfold.errors import ModelError

PROMPT = "The quick brown fox"
T5: dict[str, Any] = {
    "vocab_size": 257, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4,
    "decoder_start_token_id": 0, "eos_token_id": 256, "pad_token_id": 256, "tie_word_embeddings": False,
}  # fmt: skip
BART: dict[str, Any] = {
    "vocab_size": 257, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "max_position_embeddings": 64,
    "decoder_start_token_id": 0, "eos_token_id": 256, "pad_token_id": 256, "bos_token_id": 0, "init_std": 0.3,
    "forced_eos_token_id": None,
}  # fmt: skip


def t5() -> Any:
    return hf.T5ForConditionalGeneration(hf.T5Config(**T5))


def bart() -> Any:
    return hf.BartForConditionalGeneration(hf.BartConfig(**BART))


def bert_decoder() -> Any:
    config = tiny_lm.encoder().config.to_dict() | {"is_decoder": True, "eos_token_id": 256, "bos_token_id": 0}
    return hf.BertGenerationDecoder(hf.BertGenerationConfig(**config))


def written(family: Any, path: Path) -> Path:
    torch.manual_seed(0)
    model = family()
    model.generation_config.decoder_start_token_id = 0
    return tiny_lm.folder(path, model.eval())


@pytest.mark.parametrize("family", [t5, bart, bert_decoder])
def test_what_transformers_generates_is_what_comes_out(family: Any, tmp_path: Path) -> None:
    """Of the original the same tokens; of the quantized one as many as asked for, or fewer."""
    folder = written(family, tmp_path / "model")
    model: Any = type(family()).from_pretrained(folder)
    tokens = tiny_lm.tokenizer()(PROMPT, return_tensors="pt")["input_ids"]
    out = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=5, do_sample=False)[0]
    new = out[1:] if model.config.is_encoder_decoder else out[tokens.shape[1] :]
    expected = tiny_lm.tokenizer().decode(new, skip_special_tokens=True)
    found = Writer.open(folder).write(PROMPT, Sampling(5))
    assert (found.text, found.tokens) == (expected, len(new))
    bitfold.quantize(folder, tmp_path / "out", bits=8)
    assert 0 < Writer.open(tmp_path / "out").write(PROMPT, Sampling(5)).tokens <= 5


def test_an_answer_stands_alone(tmp_path: Path) -> None:
    """The command does not print a prompt in front of what does not go on with it."""
    folder = written(t5, tmp_path / "model")
    result = CliRunner().invoke(app, ["generate", str(folder), PROMPT, "--max-new-tokens", "3"])
    assert result.exit_code == 0, result.output
    assert PROMPT not in result.stdout


@pytest.mark.parametrize("cls", ["BertModel", "BertForMaskedLM", "BertForSequenceClassification"])
def test_encoders_write_nothing(cls: str, tmp_path: Path) -> None:
    folder = tiny_lm.folder(tmp_path / "model", tiny_lm.encoder(cls))
    with pytest.raises(ModelError, match=f"{cls} generates no text"):
        Writer.open(folder)


def test_a_family_that_wants_a_picture(tmp_path: Path) -> None:
    text = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = hf.BlipConfig(
        text_config={**text, "vocab_size": 257, "encoder_hidden_size": 64, "bos_token_id": 0, "pad_token_id": 256},
        vision_config={**text, "image_size": 32, "patch_size": 8},
    )
    torch.manual_seed(0)
    folder = tiny_lm.folder(tmp_path / "model", hf.BlipForConditionalGeneration(config).eval())
    bitfold.quantize(folder, tmp_path / "out", bits=8)
    with pytest.raises(ModelError, match="does not write from this text alone"):
        Writer.open(tmp_path / "out").write(PROMPT, Sampling(2))
