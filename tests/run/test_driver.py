"""The driver on real folders: what it writes, what it refuses, what it leaves behind when it fails."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import bitfold
from bitfold.checkpoints.bitfold_folder import QuantizedSource
from bitfold.errors import BitfoldError, CheckpointError, FormatError, ModelError, RecipeError, UsageError, WeightError
from bitfold.recipes.recipe import Recipe, Rule
from numerics import check_same_answers, check_same_tensors


def tiny(folder: Path, *, tied: bool = True, shard: str = "5GB") -> Path:
    """A random Llama with side files, as save_pretrained writes it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=136,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size=shard)
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "pytorch_model.bin").write_bytes(b"not to be carried over")
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny(tmp_path / "source")


def logits(model: torch.nn.Module) -> torch.Tensor:
    """Answers to a fixed input."""
    with torch.no_grad():
        return model(torch.arange(20)[None] % 96).logits


@pytest.mark.parametrize(
    "options", [{"bits": b} for b in range(1, 9)] + [{"format": "nf4-dq"}, {"format": "mxfp4"}], ids=str
)
def test_folder_is_complete_and_loads_both_ways(source: Path, tmp_path: Path, options: dict[str, object]) -> None:
    """Our loader and transformers' give the same logits, those of the dequantized weights; side files come along."""
    out = tmp_path / "out"
    report = bitfold.quantize(source, out, **options)  # type: ignore[arg-type]
    assert {"chat_template.jinja", "tokenizer_config.json", "generation_config.json", "README.md"} <= {
        f.name for f in out.iterdir()
    }
    assert not (out / "pytorch_model.bin").exists()
    assert len(report.quantized) == 14 + ("bits" in options)  # the embedding, which is the head, too
    models = bitfold.load(out, dtype=torch.float32), AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    check_same_tensors(*models)
    ours, theirs = map(logits, models)
    check_same_answers(ours, theirs)
    plain = LlamaForCausalLM.from_pretrained(source, dtype=torch.float32)
    quantized = QuantizedSource(out)
    state = {name: quantized.read(name).float() for name in quantized.names()}
    plain.load_state_dict(state, strict=False)
    assert torch.allclose(ours, logits(plain), atol=1e-5, rtol=1e-5)


def test_same_input_same_bytes(source: Path, tmp_path: Path) -> None:
    """Also with another number of threads."""
    bitfold.quantize(source, tmp_path / "a", bits=3)
    threads = torch.get_num_threads()
    torch.set_num_threads(3 - min(threads, 2))  # one if there were more, else two
    bitfold.quantize(source, tmp_path / "b", bits=3)
    torch.set_num_threads(threads)
    files = [(tmp_path / f / "model.safetensors").read_bytes() for f in "ab"]
    assert files[0] == files[1]


def test_every_tensor_is_accounted_for(source: Path, tmp_path: Path) -> None:
    """The report names each tensor of the source once; sizes add up to what is in the file."""
    report = bitfold.quantize(source, tmp_path / "out", bits=4, keep_embeddings=True)
    assert sorted(t.tensor for t in report.tensors) == sorted(load_file(source / "model.safetensors"))
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert report.bytes_after == sum(t.numel() * t.element_size() for t in stored.values())
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert set(config["tensors"]) | set(config["kept"]) == {t.tensor for t in report.tensors}
    assert config["kept"]["model.embed_tokens.weight"].startswith("embedding")


def test_dry_run_predicts_the_bytes_and_writes_nothing(source: Path, tmp_path: Path) -> None:
    """Exact, because layouts are exact."""
    plan = bitfold.quantize(source, tmp_path / "out", bits=3, dry_run=True)
    assert not (tmp_path / "out").exists()
    done = bitfold.quantize(source, tmp_path / "out", bits=3)
    assert (plan.bytes_before, plan.bytes_after) == (done.bytes_before, done.bytes_after)
    assert [t.tensor for t in plan.tensors] == [t.tensor for t in done.tensors]


def test_shards(tmp_path: Path) -> None:
    """Sharded in, sharded out, same tensors."""
    source = tiny(tmp_path / "source", shard="30KB")
    assert len(list(source.glob("*.safetensors"))) > 2
    bitfold.quantize(source, tmp_path / "one", bits=4)
    bitfold.quantize(source, tmp_path / "many", bits=4, max_shard_bytes=20_000)
    shards = list((tmp_path / "many").glob("*.safetensors"))
    assert len(shards) > 2
    together = {name: t for shard in shards for name, t in load_file(shard).items()}
    single = load_file(tmp_path / "one" / "model.safetensors")
    assert together.keys() == single.keys()
    assert all(torch.equal(together[n], single[n]) for n in single)
    check_same_tensors(bitfold.load(tmp_path / "one"), bitfold.load(tmp_path / "many"))


def test_rules(source: Path, tmp_path: Path) -> None:
    """First match wins; embeddings and the tied head are quantized when a rule names them."""
    recipe = Recipe(
        (
            Rule("re:model.layers.0.", "keep"),
            Rule("*down_proj*", "int8", fit="absmax", act="int8"),
            Rule("embed_tokens", "int4-g32"),
            Rule("*", "int3-asym-g32"),
        )
    )
    (tmp_path / "recipe.toml").write_text(recipe.dumps())
    assert Recipe.load(tmp_path / "recipe.toml") == recipe
    report = bitfold.quantize(source, tmp_path / "out", recipe=tmp_path / "recipe.toml", ignore=["k_proj"])
    formats = {t.tensor: t.format for t in report.tensors}
    assert formats["model.layers.0.mlp.up_proj.weight"] is None
    assert formats["model.layers.1.mlp.up_proj.weight"] == "int3-asym-g32"
    assert formats["model.layers.1.mlp.down_proj.weight"] == "int8"
    assert formats["model.layers.1.self_attn.k_proj.weight"] is None
    assert formats["model.embed_tokens.weight"] == "int4-g32"
    model = bitfold.load(tmp_path / "out", dtype=torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.model.layers[1].mlp.down_proj.weight.act == "int8"
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    check_same_tensors(model, theirs)
    check_same_answers(logits(model), logits(theirs))


def test_mixture_of_experts(tmp_path: Path) -> None:
    """Experts stored one by one are quantized as the stack that the model holds; every one of them."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=72,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=3,
    )
    MixtralForCausalLM(config).save_pretrained(tmp_path / "source")
    report = bitfold.quantize(tmp_path / "source", tmp_path / "out", bits=8)
    formats = {t.tensor: (t.format, t.shape) for t in report.tensors}
    assert formats["model.layers.0.mlp.experts.gate_up_proj"] == ("int8", (3, 144, 64))
    assert formats["model.layers.0.mlp.experts.down_proj"] == ("int8", (3, 64, 72))
    assert formats["model.layers.0.mlp.gate.weight"][0] is None
    expected = logits(MixtralForCausalLM.from_pretrained(tmp_path / "source"))
    found = logits(bitfold.load(tmp_path / "out"))
    assert (found - expected).abs().max() < 0.02 * expected.abs().max()


def test_unknown_model_class_is_judged_by_names(tmp_path: Path) -> None:
    """Data-free methods need no model class."""
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "someone-elses", "architectures": ["Theirs"]}')
    tensors = {
        "tok_embeddings.weight": torch.randn(50, 64),
        "blocks.0.ff.weight": torch.randn(128, 64),
        "blocks.0.router.weight": torch.randn(4, 64),
        "blocks.0.norm.weight": torch.randn(64),
        "lm_head.weight": torch.randn(50, 64),
    }
    save_file(tensors, folder / "model.safetensors")
    report = bitfold.quantize(folder, tmp_path / "out", bits=4)
    assert [t.tensor for t in report.quantized] == ["blocks.0.ff.weight"]
    with pytest.raises(ModelError, match="Theirs"):
        bitfold.load(tmp_path / "out")


def broken(kind: str, source: Path) -> None:
    """Damage a source folder."""
    weights = source / "model.safetensors"
    data = weights.read_bytes()
    if kind == "truncated":
        weights.write_bytes(data[: len(data) // 2])
    elif kind == "header":
        weights.write_bytes(struct.pack("<Q", 1 << 60) + data[8:])
    elif kind == "empty":
        weights.write_bytes(b"")
    elif kind == "config":
        (source / "config.json").unlink()
    elif kind == "not json":
        (source / "config.json").write_text("{")
    elif kind == "pickle":
        weights.unlink()
    elif kind == "nan":
        tensors = load_file(weights)
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
        save_file(tensors, weights)
    elif kind == "missing tensor":
        tensors = load_file(weights)
        del tensors["model.layers.1.mlp.up_proj.weight"]
        save_file(tensors, weights)
    elif kind == "escape":
        weights.unlink()
        index = {"weight_map": {"a": "../../etc/passwd"}}
        (source / "model.safetensors.index.json").write_text(json.dumps(index))


DAMAGE: list[tuple[str, type[BitfoldError], str]] = [
    ("truncated", CheckpointError, "model.safetensors.*truncated"),
    ("header", CheckpointError, "model.safetensors.*truncated"),
    ("empty", CheckpointError, "model.safetensors"),
    ("config", CheckpointError, "no config.json"),
    ("not json", CheckpointError, "config.json"),
    ("pickle", CheckpointError, "pickled"),
    ("nan", WeightError, "model.layers.1.mlp.up_proj.weight.*NaN"),
    ("missing tensor", ModelError, "model.layers.1.mlp.up_proj.weight"),
    ("escape", CheckpointError, "not in this folder"),
]


@pytest.mark.parametrize(("kind", "error", "message"), DAMAGE, ids=[d[0] for d in DAMAGE])
def test_damaged_sources(source: Path, tmp_path: Path, kind: str, error: type[BitfoldError], message: str) -> None:
    """One clear error; nothing is left that looks whole."""
    broken(kind, source)
    with pytest.raises(error, match=message):
        bitfold.quantize(source, tmp_path / "out", bits=4)
    assert not (tmp_path / "out").exists()
    finished = [tmp_path / ".out.partial"] if kind == "nan" else []  # what was done before the bad tensor stays
    assert [p for p in tmp_path.iterdir() if p.name != "source"] == finished


def test_bad_requests(source: Path, tmp_path: Path) -> None:
    """Each names the option and says what to do."""
    out = tmp_path / "out"
    with pytest.raises(FormatError, match="unknown format"):
        bitfold.quantize(source, out, format="int44")
    with pytest.raises(FormatError, match=r"layers.0.*groups of 128.*longer than the rows"):
        bitfold.quantize(source, out, bits=4, group_size=128)
    with pytest.raises(UsageError, match="--bits"):
        bitfold.quantize(source, out)
    with pytest.raises(UsageError, match="9 bits"):
        bitfold.quantize(source, out, bits=9)
    with pytest.raises(UsageError, match="fit"):
        bitfold.quantize(source, out, bits=4, fit="best")
    with pytest.raises(RecipeError, match="cannot be read"):
        bitfold.quantize(source, out, recipe=tmp_path / "none.toml")
    with pytest.raises(CheckpointError, match="source"):
        bitfold.quantize(source, source, bits=4)
    assert not out.exists()
    bitfold.quantize(source, out, bits=4)
    with pytest.raises(CheckpointError, match="quantized already"):
        bitfold.quantize(out, tmp_path / "again", bits=4)


def test_interrupted_writes_leave_nothing(source: Path, tmp_path: Path) -> None:
    """Whatever ends the run, the output folder does not exist until it is whole."""

    def stop(_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bitfold.quantize(source, tmp_path / "out", bits=4, on_tensor=stop)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.partial", "source"]


def _edit(folder: Path, change: str) -> None:
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    name = "model.layers.0.mlp.up_proj.weight.codes"
    if change == "missing":
        del tensors[name]
    elif change == "extra":
        tensors["stray"] = torch.zeros(2)
    elif change == "misshapen":
        tensors[name] = tensors[name][:10].clone()
    save_file(tensors, weights, metadata={"format": "pt"})


@pytest.mark.parametrize("change", ["missing", "extra", "misshapen"])
def test_loading_names_what_does_not_match(source: Path, tmp_path: Path, change: str) -> None:
    """Missing, extra, misshapen tensors."""
    bitfold.quantize(source, tmp_path / "out", bits=4, method="rtn")
    _edit(tmp_path / "out", change)
    with pytest.raises(ModelError, match="stray" if change == "extra" else "up_proj.weight.codes"):
        bitfold.load(tmp_path / "out")


_MEMORY = """
import json, sys, torch, bitfold
from bitfold.records.run_report import peak_memory
import transformers, bitfold.run.driver, bitfold.models.load
from transformers import LlamaForCausalLM
before = peak_memory()
if sys.argv[1] == "quantize":
    bitfold.quantize(sys.argv[2], sys.argv[3], format=sys.argv[4], fit="absmax")
else:
    for tensor in bitfold.load(sys.argv[2]).state_dict().values():
        tensor.reshape(-1).view(torch.uint8)[::1024].max()  # bring in every page of the file
print(json.dumps([before, peak_memory()]))
"""


def run_measured(*args: str) -> tuple[int, int]:
    """Peak memory of a fresh process before and after the work."""
    done = subprocess.run([sys.executable, "-c", _MEMORY, *args], capture_output=True, text=True, check=True)
    before, after = json.loads(done.stdout.splitlines()[-1])
    return before, after


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not tell the peak of a process")
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """A deeper model of the same width needs no more; loading 8 bits peaks below 1.3 times the folder."""
    growth = {}
    for layers in (2, 12):
        folder = tmp_path / str(layers)
        config = LlamaConfig(
            vocab_size=1024, hidden_size=768, intermediate_size=3072, num_hidden_layers=layers, num_attention_heads=8
        )
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
        before, after = run_measured("quantize", str(folder), str(tmp_path / f"{layers}-out"), "int8")
        growth[layers] = after - before
    source = sum(f.stat().st_size for f in (tmp_path / "12").glob("*.safetensors"))
    assert source > 200e6
    # Ten more layers are 190 MB of source; the largest tensor and its temporaries are what memory is for.
    assert growth[12] - growth[2] < 0.1 * source
    folder_size = sum(f.stat().st_size for f in (tmp_path / "12-out").glob("*.safetensors"))
    before, after = run_measured("load", str(tmp_path / "12-out"))
    assert after - before < 1.3 * folder_size


def test_a_text_that_is_not_there_is_refused_before_the_model_is_opened(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such text file"):
        bitfold.quantize(tmp_path / "nowhere", tmp_path / "out", bits=4, calibration="code + none.txt:0.5")
