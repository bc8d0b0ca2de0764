"""A GGUF file runs on its own blocks: mapped, not decoded, in the rows that the model wants."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import bitfold
from bitfold.checkpoints.gguf.file import GgufFile
from bitfold.checkpoints.gguf.source import GgufSource
from bitfold.engine.decoder import Decoder
from bitfold.errors import CheckpointError
from bitfold.models.model_ref import ModelRef
from bitfold.nn import QWeight
from bitfold.system import native
from gguf_files import LLAMA, converted, llama_tensors, metadata_of, write_gguf

pytest.importorskip("gguf", reason="the gguf package (dev extra) writes the files")
transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-3}
HEAD = {"attention.key_length": 16, "attention.value_length": 16}
# GGUF architecture: (config beyond SIZES, metadata beyond the common facts).
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {}, {"rope.dimension_count": 16}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}, HEAD),
    "gemma3": (
        "gemma3_text",
        {"query_pre_attn_scalar": 16, "sliding_window": 4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        {
            **HEAD,
            "attention.sliding_window": 4,
            "rope.freq_base": 1e6,
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 8.0,
        },
    ),
}
TYPES = ("q4_0", "q5_1", "q8_0", "f16", "q5_0", "q4_1")


def write(tmp_path: Path, arch: str) -> Path:
    """A random model whose matrices have all kinds of types in turn."""
    model_type, options, extra = MODELS[arch]
    config = transformers.AutoConfig.for_model(model_type, **{**SIZES, **options})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.3)
    state = model.state_dict()
    if config.tie_word_embeddings:
        state.pop("lm_head.weight")
    tensors = converted(state, arch, SIZES["num_attention_heads"], SIZES["num_key_value_heads"])
    matrices = [name for name, w in tensors.items() if w.ndim == 2]
    types = {name: TYPES[i % len(TYPES)] for i, name in enumerate(matrices)}
    return write_gguf(tmp_path / "model.gguf", arch, tensors, metadata_of(config, arch, **extra), types)


def packed(model: torch.nn.Module) -> dict[str, QWeight]:
    return {name: m for name, m in model.named_modules() if isinstance(m, QWeight)}


@pytest.mark.parametrize("arch", MODELS)
def test_weights_are_the_file_s_and_stay_packed(arch: str, tmp_path: Path):
    path = write(tmp_path, arch)
    model, source = bitfold.load(path), GgufSource(path)
    blocks = {name for name in source.names() if source.info(name).dtype == torch.float32 and "norm" not in name}
    found = packed(model)
    assert found.keys() == {n for n in source.quantized() if n in blocks}
    assert {w.format.name for w in found.values()} == set(TYPES) - {"f16"}
    for name, weight in found.items():
        assert torch.equal(weight.qtensor.dequantize(), source.read(name)), name
    for name in source.names():
        if name not in found:
            assert torch.allclose(model.get_parameter(name).float(), source.read(name).float(), rtol=1e-2), name


@pytest.mark.parametrize("arch", MODELS)
def test_weights_lie_in_the_mapped_file(arch: str, tmp_path: Path):
    path = write(tmp_path, arch)
    source, file = GgufSource(path), GgufFile(path)
    mapped = {
        n: w.blocks.data_ptr() - file.tensors[source.stored_name(n)].start
        for n, w in packed(bitfold.load(path)).items()
    }
    turned = [n for n in mapped if arch == "llama" and (".q_proj." in n or ".k_proj." in n)]
    assert len({base for n, base in mapped.items() if n not in turned}) == 1  # one map, each at its place in the file


@pytest.mark.parametrize("arch", MODELS)
def test_logits_are_those_of_the_decoded_weights(arch: str, tmp_path: Path):
    path = write(tmp_path, arch)
    source = GgufSource(path)
    plain = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**source.config)).float()
    plain.load_state_dict({name: source.read(name).float() for name in source.names()}, strict=False)
    ids = torch.randint(0, 96, (1, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = plain.eval()(input_ids=ids).logits[0]
        model = ModelRef.of(path).load("AutoModelForCausalLM", torch.float32)
        got = {"layers": model(input_ids=ids).logits[0]}
    if native.core() is not None:
        decoder = Decoder(model, 64, 2)
        got["prompt"] = decoder.logits(ids[0].tolist())
        decoder.ids.clear()
        got["tokens"] = torch.stack([decoder.extend([token]) for token in ids[0].tolist()])
    for how, logits in got.items():
        # Keys and values in bfloat16 cost the engine its digits.
        bound = 1e-4 if how == "layers" else 2e-2
        assert (logits - want).abs().max() <= bound * want.abs().max(), how


def test_what_is_written_to_a_weight_stays_in_memory(tmp_path: Path):
    path = write(tmp_path, "qwen2")
    before = path.read_bytes()
    weight = next(iter(packed(bitfold.load(path)).values()))
    weight.blocks.fill_(0)
    assert path.read_bytes() == before


def test_a_truncated_file_is_refused(tmp_path: Path):
    path = write(tmp_path, "llama")
    whole = path.read_bytes()
    for size in (0, 3, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError):
            bitfold.load(path)


def test_types_without_a_codec_are_refused_by_name(tmp_path: Path):
    tensors = llama_tensors()
    path = write_gguf(tmp_path / "model.gguf", "llama", tensors, LLAMA)
    raw = bytearray(path.read_bytes())
    name = b"token_embd.weight"
    at = raw.index(name) + len(name) + 4 + 2 * 8  # number of dimensions, dimensions, then the type
    raw[raw.index(name) + len(name) + 4 : at] = (256).to_bytes(8, "little") + (48).to_bytes(8, "little")
    raw[at : at + 4] = (16).to_bytes(4, "little")  # IQ2_XXS, fewer bytes
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"token_embd|iq2_xxs"):
        bitfold.load(path)
