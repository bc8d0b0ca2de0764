"""Parameters that a family never saves, because it computes them: Marian's sinusoidal positions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

import bitfold
import tiny_lm
from bitfold import Calibration
from bitfold.engine import Sampling, Writer
from bitfold.models import skeleton

POSITIONS = "model.encoder.embed_positions.weight"
IDS = torch.randint(0, 256, (1, 12), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def marian(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = hf.MarianConfig(
        vocab_size=257, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=96, decoder_ffn_dim=96, max_position_embeddings=64,
        decoder_start_token_id=0, eos_token_id=256, pad_token_id=256, bos_token_id=0, init_std=0.15,
        forced_eos_token_id=None, decoder_vocab_size=257,
    )  # fmt: skip
    torch.manual_seed(0)
    return tiny_lm.folder(tmp_path_factory.mktemp("marian"), hf.MarianMTModel(config).eval())


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=IDS, decoder_input_ids=IDS).logits
    return found


def test_a_skeleton_has_them(marian: Path) -> None:
    original: Any = hf.MarianMTModel.from_pretrained(marian)
    found = skeleton.of_config(original.config.to_dict(), str(marian))
    assert found is not None
    assert torch.equal(found.get_parameter(POSITIONS), original.get_parameter(POSITIONS))
    others = [name for name, p in found.named_parameters() if not p.is_meta]
    assert others == [POSITIONS, POSITIONS.replace("encoder", "decoder")]


@pytest.mark.parametrize("bits", [8, 4])
def test_a_folder_without_them(marian: Path, tmp_path: Path, bits: int) -> None:
    """Rounded and calibrated: it loads, computes what the original computes but for the rounding, and answers."""
    (tmp_path / "text.txt").write_text(tiny_lm.TEXT)
    calibration = Calibration(str(tmp_path / "text.txt"), nsamples=2, seqlen=16)
    report = bitfold.quantize(marian, tmp_path / "out", bits=bits, calibration=calibration)
    assert report.fallbacks == []
    reference = logits(hf.MarianMTModel.from_pretrained(marian))
    error = (logits(bitfold.load(tmp_path / "out")) - reference).norm() / reference.norm()
    assert float(error) < (0.05 if bits == 8 else 0.5)
    assert Writer.open(tmp_path / "out").write("The fox", Sampling(2)).tokens


def test_a_tensor_that_may_not_be_absent_is_still_missed(marian: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    bitfold.quantize(marian, tmp_path / "out", bits=8)
    (file,) = (tmp_path / "out").glob("*.safetensors")
    tensors = load_file(file)
    del tensors["model.encoder.layers.0.final_layer_norm.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(bitfold.errors.ModelError, match=r"missing model\.encoder\.layers\.0\.final_layer_norm\.weight"):
        bitfold.load(tmp_path / "out")
