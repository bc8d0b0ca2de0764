"""Perplexity and KL against a float64 computation of their definitions; what is refused, and how."""

from __future__ import annotations

import copy
import json
import math
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import tiny_lm
from bitfold.errors import BitfoldError, CheckpointError, ModelError, QualityError, UsageError
from bitfold.evaluation import evaluate, fidelity, reading
from bitfold.models import model_ref as subjects
from bitfold.text import windows as texts
from tiny_lm import disturbed

CONTEXT = 64


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_lm.folder(tmp_path_factory.mktemp("lm") / "original", tiny_lm.model())


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_lm.folder(tmp_path_factory.mktemp("lm") / "changed", disturbed(tiny_lm.model(), 0.02))


def by_definition(model: nn.Module, reference: nn.Module, starts: list[tuple[int, int]]) -> dict[str, float]:
    """float64, one window (start, first position that counts) at a time, straight from the formulas."""
    ids = torch.tensor(tiny_lm.tokenizer()(tiny_lm.TEXT, add_special_tokens=False)["input_ids"])
    nll, kl, agree = [], [], []
    for start, first in starts:
        window = ids[start : start + CONTEXT]
        with torch.no_grad():
            q, p = (m.double()(input_ids=window[None]).logits[0].log_softmax(-1) for m in (model, reference))
        for i in range(first, CONTEXT - 1):
            nll.append(-q[i, window[i + 1]].item())
            kl.append(sum(math.exp(a) * (a - b) for a, b in zip(p[i].tolist(), q[i].tolist(), strict=True)))
            agree.append(p[i].argmax() == q[i].argmax())
    return {"perplexity": math.exp(np.mean(nll)), "kl": float(np.mean(kl)), "top1": float(np.mean(agree))}


def side_by_side(count: int) -> list[tuple[int, int]]:
    return [(i * CONTEXT, 0) for i in range(count)]


@pytest.mark.parametrize("batch", [1, 3])
def test_numbers_by_definition(original: Path, changed: Path, batch: int) -> None:
    result = evaluate(changed, original, tiny_lm.TEXT, context=CONTEXT, max_tokens=5 * CONTEXT + 9, batch=batch)
    expected = by_definition(disturbed(tiny_lm.model(), 0.02), tiny_lm.model(), side_by_side(5))
    assert result.tokens == 5 * (CONTEXT - 1)
    assert result.windows == 5
    assert result.perplexity == pytest.approx(expected["perplexity"], rel=1e-5)
    assert expected["kl"] > 0.01
    assert result.kl_mean == pytest.approx(expected["kl"], rel=1e-4)
    assert result.top1 == expected["top1"] < 1
    assert result.kl_median is not None
    assert result.kl_p99 is not None
    assert result.kl_max is not None
    assert 0 < result.kl_median < result.kl_p99 < result.kl_max


def test_overlapping_windows_predict_each_token_once(original: Path, changed: Path) -> None:
    result = evaluate(changed, original, tiny_lm.TEXT, context=CONTEXT, stride=20, max_tokens=CONTEXT + 40)
    starts = [(0, 0), (20, CONTEXT - 21), (40, CONTEXT - 21)]
    expected = by_definition(disturbed(tiny_lm.model(), 0.02), tiny_lm.model(), starts)
    assert result.tokens == CONTEXT + 40 - 1
    assert result.perplexity == pytest.approx(expected["perplexity"], rel=1e-5)
    assert result.kl_mean == pytest.approx(expected["kl"], rel=1e-4)


def test_the_floor_of_the_measurement(original: Path) -> None:
    """A model against itself: nothing but the rounding of stored predictions."""
    result = evaluate(original, original, tiny_lm.TEXT, context=CONTEXT, max_tokens=512)
    assert result.top1 == 1.0
    assert result.kl_mean is not None
    assert abs(result.kl_mean) < 1e-6
    assert result.top5 is not None
    assert result.top5 > 0.999
    assert result.perplexity == pytest.approx(result.reference_perplexity, rel=1e-5)


def test_modules_side_by_side_equal_folders(original: Path, changed: Path) -> None:
    on_disk = evaluate(changed, original, tiny_lm.TEXT, context=CONTEXT, max_tokens=256)
    reference, model = tiny_lm.model(), disturbed(tiny_lm.model(), 0.02)
    in_memory = evaluate(model, reference, tiny_lm.TEXT, context=CONTEXT, max_tokens=256, tokenizer=tiny_lm.tokenizer())
    assert in_memory.perplexity == pytest.approx(on_disk.perplexity, rel=1e-5)
    assert in_memory.reference_perplexity == pytest.approx(on_disk.reference_perplexity, rel=1e-5)
    assert in_memory.kl_mean == pytest.approx(on_disk.kl_mean, rel=1e-5)
    itself = evaluate(model, model, tiny_lm.TEXT, context=CONTEXT, max_tokens=256, tokenizer=tiny_lm.tokenizer())
    assert 0 <= itself.kl_mean <= itself.kl_max < 1e-6


def test_without_a_reference(original: Path) -> None:
    result = evaluate(original, None, tiny_lm.TEXT, context=CONTEXT, max_tokens=256)
    assert result.kl_mean is None
    assert result.top1 is None
    assert result.reference_perplexity is None
    assert result.size == (original / "model.safetensors").stat().st_size
    assert result.bpw is None
    with pytest.raises(UsageError, match="needs a reference"):
        result.require(max_kl=1.0)


def test_a_quantized_folder(original: Path, tmp_path: Path) -> None:
    from bitfold.run.driver import quantize

    report = quantize(original, tmp_path / "q", bits=4, group_size=32)
    result = evaluate(tmp_path / "q", original, tiny_lm.TEXT, context=CONTEXT, max_tokens=256)
    assert result.bpw == pytest.approx(report.bpw_quantized)
    assert result.kl_mean is not None
    assert 1e-3 < result.kl_mean < 1
    json.dumps(result.to_dict(), allow_nan=False)
    result.require(max_kl=result.kl_mean)
    with pytest.raises(QualityError, match="above the limit") as caught:
        result.require(max_kl=result.kl_mean / 2)
    assert caught.value.exit_code == 7


def test_cached_predictions_are_used_and_kept_apart(
    original: Path, changed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(reference: Path, tokens: int = 256) -> float:
        result = evaluate(changed, reference, tiny_lm.TEXT, context=CONTEXT, max_tokens=tokens, cache_dir=tmp_path)
        assert result.kl_mean is not None
        return result.kl_mean

    first = run(original)
    loaded = []
    load = subjects.ModelRef.load
    monkeypatch.setattr(
        subjects.ModelRef, "load", lambda self, *a, **k: (loaded.append(self.path), load(self, *a, **k))[1]
    )
    assert run(original) == first
    assert loaded == [changed]
    assert run(changed) == pytest.approx(0, abs=1e-6)  # another reference
    assert run(original, 320) != first  # another text
    assert not list(tmp_path.glob("*.partial"))


def test_nothing_is_left_in_the_temporary_folder(
    original: Path, changed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    evaluate(changed, original, tiny_lm.TEXT, context=CONTEXT, max_tokens=128)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_cache_is_named(original: Path, changed: Path, tmp_path: Path) -> None:
    evaluate(changed, original, tiny_lm.TEXT, context=CONTEXT, max_tokens=128, cache_dir=tmp_path)
    (data,) = tmp_path.glob("*.predictions")
    data.write_bytes(data.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        evaluate(changed, original, tiny_lm.TEXT, context=CONTEXT, max_tokens=128, cache_dir=tmp_path)


class _Constant(nn.Module):
    """Predicts the same logits everywhere."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> object:
        from transformers.modeling_outputs import CausalLMOutput

        return CausalLMOutput(logits=self.logits.expand(*input_ids.shape, -1))


def test_kl_of_known_distributions() -> None:
    """KL((1/2, 1/2) || (3/4, 1/4)) = ln(2 / sqrt 3); entries that both rule out count nothing."""
    text = " e" * 100 + "\n"
    ids = tiny_lm.tokenizer()(" e")["input_ids"]
    p, q = torch.full((257,), -torch.inf), torch.full((257,), -torch.inf)
    p[ids], q[ids] = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.75, 0.25]).log()
    result = evaluate(_Constant(q), _Constant(p), text, context=50, max_tokens=100, tokenizer=tiny_lm.tokenizer())
    assert result.kl_mean == pytest.approx(math.log(2 / math.sqrt(3)), rel=1e-6)
    assert result.reference_perplexity == pytest.approx(2.0, rel=1e-6)
    # windows begin with a space, so of 49 predictions 25 are "e" (1/4) and 24 the space (3/4)
    assert result.perplexity == pytest.approx(math.exp((25 * math.log(4) + 24 * math.log(4 / 3)) / 49), rel=1e-6)


def _refused(kind: type[BitfoldError], match: str, *args: object, **options: object) -> None:
    with pytest.raises(kind, match=match):
        evaluate(*args, **options)  # type: ignore[arg-type]


def test_refusals(original: Path, tmp_path: Path) -> None:
    long = tiny_lm.TEXT
    _refused(UsageError, "no such text file", original, None, "nowhere.txt")
    _refused(UsageError, "fewer than one window", original, None, "too short\n")
    _refused(UsageError, "at most 128 tokens", original, None, long, context=129)
    _refused(UsageError, "at least 2", original, None, long, context=1)
    _refused(UsageError, "stride", original, None, long, context=10, stride=11)
    _refused(UsageError, "one window of 10", original, None, long, context=10, max_tokens=9)
    _refused(UsageError, "unknown dtype", original, None, long, dtype="int8")
    _refused(UsageError, "no tokenizer", tiny_lm.model(), None, long)
    _refused(CheckpointError, "single file", original / "model.safetensors", None, long)
    _refused(CheckpointError, "no config.json", tmp_path, None, long)
    _refused(CheckpointError, "no such file", tmp_path / "nowhere", None, long)
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    _refused(UsageError, "UTF-8", original, None, binary)


def test_a_window_is_no_longer_than_the_tokens_asked_for(original: Path) -> None:
    found = evaluate(original, None, tiny_lm.TEXT, max_tokens=50)
    assert (found.context, found.windows) == (50, 1)


def test_an_encoder_has_no_perplexity(tmp_path: Path) -> None:
    folder = tiny_lm.folder(tmp_path / "bert", tiny_lm.encoder("BertForMaskedLM"))
    _refused(ModelError, "does not predict the next token", folder, None, tiny_lm.TEXT)


def test_missing_tensors_are_not_drawn_at_random(original: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    damaged = tiny_lm.folder(tmp_path / "damaged", tiny_lm.model())
    tensors = load_file(damaged / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, damaged / "model.safetensors", {"format": "pt"})
    _refused(ModelError, "model.layers.1.mlp.up_proj.weight", damaged, None, tiny_lm.TEXT, context=CONTEXT)


def test_nan_is_an_error(original: Path) -> None:
    model = tiny_lm.model()
    with torch.no_grad():
        next(model.parameters())[5:] = torch.nan
    options = {"context": CONTEXT, "tokenizer": tiny_lm.tokenizer()}
    _refused(ModelError, "NaN or infinity", model, original, tiny_lm.TEXT, **options)


def test_another_tokenizer_is_not_a_reference(original: Path, tmp_path: Path) -> None:
    other = tiny_lm.folder(tmp_path / "other", tiny_lm.model(1))
    raw = json.loads((other / "tokenizer.json").read_text())
    raw["model"]["vocab"] = {symbol: (i + 1) % 257 for symbol, i in raw["model"]["vocab"].items()}
    (other / "tokenizer.json").write_text(json.dumps(raw))
    _refused(UsageError, "different tokens", other, original, tiny_lm.TEXT, context=CONTEXT)


def test_another_vocabulary_is_not_a_reference() -> None:
    models = _Constant(torch.zeros(257)), _Constant(torch.zeros(300))
    options = {"context": 10, "tokenizer": tiny_lm.tokenizer()}
    _refused(UsageError, "predicts 300 tokens, the model 257", *models, tiny_lm.TEXT, **options)


def test_a_text_comes_with_the_package(original: Path) -> None:
    result = evaluate(original, context=CONTEXT, max_tokens=CONTEXT)
    assert result.text == "wikitext2-test.txt (excerpt in the package)"
    words = [word for line in texts.read_lines(None) for word in line.split()]
    assert len(words) > texts.DEFAULT_MAX_TOKENS * 0.75  # about 4/3 tokens a word: enough for the default


def test_defaults_are_those_of_the_command() -> None:
    assert (texts.DEFAULT_CONTEXT, texts.DEFAULT_MAX_TOKENS) == (2048, 20480)
    assert fidelity.evaluate.__kwdefaults__["max_tokens"] == 20480


# --- other families, other kinds, other texts -----------------------------------------------------------------------


def family(name: str) -> nn.Module:
    """A tiny causal model of another family; Gemma 2 caps its logits after the head."""
    import transformers as hf

    common = {"vocab_size": 257, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 256}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 128, "initializer_range": 0.3}
    torch.manual_seed(3)
    if name == "gpt2":
        config = hf.GPT2Config(
            vocab_size=257, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.3, pad_token_id=256,
            bos_token_id=256, eos_token_id=256,
        )  # fmt: skip
        return hf.GPT2LMHeadModel(config).eval()
    if name == "gemma2":
        extra = {"num_key_value_heads": 2, "head_dim": 8, "final_logit_softcapping": 3.0, "eos_token_id": 256}
        return hf.Gemma2ForCausalLM(hf.Gemma2Config(**common, **sizes, **extra, bos_token_id=None)).eval()
    config = hf.OPTConfig(
        vocab_size=257, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, init_std=0.3,
        max_position_embeddings=128, word_embed_proj_dim=32, pad_token_id=256, bos_token_id=256, eos_token_id=256,
    )  # fmt: skip
    return hf.OPTForCausalLM(config).eval()


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "opt"])
def test_three_more_families_by_definition(name: str) -> None:
    reference, model = family(name), disturbed(family(name), 0.02)
    result = evaluate(
        model, reference, tiny_lm.TEXT, context=CONTEXT, max_tokens=3 * CONTEXT, tokenizer=tiny_lm.tokenizer()
    )
    expected = by_definition(model, reference, side_by_side(3))
    assert result.perplexity == pytest.approx(expected["perplexity"], rel=1e-5)
    assert expected["kl"] > 1e-3
    assert result.kl_mean == pytest.approx(expected["kl"], rel=1e-3)
    assert result.top1 == pytest.approx(expected["top1"])


@pytest.mark.parametrize(("name", "whole"), [("gpt2", False), ("gemma2", True), ("opt", False)])
def test_the_head_is_applied_in_pieces_unless_something_follows_it(name: str, whole: bool) -> None:
    model = family(name)
    reader = reading._HeadInPieces(model)
    ids = torch.arange(40)[None]
    with torch.no_grad(), reader.run(ids) as rows:
        assert torch.allclose(rows(0, 5, 9), model(input_ids=ids).logits[0, 5:9], rtol=1e-5, atol=1e-5)
    assert (reader.head is None) == whole


def test_the_five_most_likely() -> None:
    """Of (0 .. 4) and (0, 1, 2, 7, 8) three are shared."""
    p, q = torch.zeros(257), torch.zeros(257)
    p[:5], q[[0, 1, 2, 7, 8]] = 5.0, 5.0
    options = {"context": 10, "max_tokens": 40, "tokenizer": tiny_lm.tokenizer()}
    assert evaluate(_Constant(q), _Constant(p), tiny_lm.TEXT, **options).top5 == pytest.approx(0.6)


def test_masked_models_by_definition(tmp_path: Path) -> None:
    """Every eighth token hidden in a copy of its own, the rest seen; float64, one copy at a time."""
    reference = tiny_lm.encoder("BertForMaskedLM")
    model = disturbed(copy.deepcopy(reference), 0.02)
    tokenizer = tiny_lm.tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<end>"})
    ids = torch.tensor(tokenizer(tiny_lm.TEXT)["input_ids"])[: 3 * 32].view(3, 32)
    nll, kl = [], []
    for w in range(3):
        for place in range(w, 32, 8):
            copied = ids[w].clone()
            copied[place] = 256
            with torch.no_grad():
                q, p = (m.double()(input_ids=copied[None]).logits[0, place].log_softmax(-1) for m in (model, reference))
            nll.append(-q[ids[w, place]].item())
            kl.append((p.exp() * (p - q)).sum().item())
    model, reference = model.float(), reference.float()
    options = {"metric": "masked", "context": 32, "max_tokens": 96, "tokenizer": tokenizer}
    result = evaluate(model, reference, tiny_lm.TEXT, **options)
    assert result.tokens == len(nll) == 12
    assert result.perplexity == pytest.approx(math.exp(np.mean(nll)), rel=1e-5)
    assert result.kl_mean == pytest.approx(np.mean(kl), rel=1e-3)
    folder = tmp_path / "bert"
    reference.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    itself = evaluate(folder, folder, tiny_lm.TEXT, metric="masked", context=32, max_tokens=96)
    assert itself.top1 == 1.0
    assert abs(itself.kl_mean or 1) < 1e-6
    _refused(ModelError, "does not fill in", tiny_lm.folder(tmp_path / "lm", tiny_lm.model()), None, metric="masked")
    _refused(UsageError, "no mask token", model, None, tiny_lm.TEXT, metric="masked", tokenizer=tiny_lm.tokenizer())
    _refused(UsageError, "unknown metric", model, None, tiny_lm.TEXT, metric="bleu")


def test_limits(original: Path, changed: Path) -> None:
    result = evaluate(changed, original, tiny_lm.TEXT, context=CONTEXT, max_tokens=128)
    assert result.top1 is not None
    result.require(max_kl=result.kl_mean, max_perplexity=result.perplexity, min_top1=result.top1)
    for limit in ({"max_perplexity": result.perplexity - 1e-6}, {"min_top1": result.top1 + 1e-6}):
        with pytest.raises(QualityError):
            result.require(**limit)


def test_facts_of_the_run(original: Path) -> None:
    result = evaluate(original, None, tiny_lm.TEXT, context=CONTEXT, max_tokens=256)
    assert result.bpw_whole == pytest.approx(32, rel=0.05)  # float32, and a header
    assert result.tokens_per_second > 0
    assert result.peak_memory is None or result.peak_memory > 1e7


def test_tasks_of_lm_eval(original: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install 'bitfold[tasks]')")
    (tmp_path / "data.jsonl").write_text('{"q": "Line", "a": [" 1", " zebra"]}\n' * 4, encoding="utf-8")
    (tmp_path / "task.yaml").write_text(
        f"task: tiny\ndataset_path: json\ndataset_kwargs:\n  data_files: {{test: {tmp_path}/data.jsonl}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: '{{a}}'\n"
        "doc_to_target: 0\nmetric_list:\n  - metric: acc\n",
        encoding="utf-8",
    )
    options = {"context": CONTEXT, "max_tokens": 128, "limit": 3}
    result = evaluate(original, None, tiny_lm.TEXT, tasks=[str(tmp_path / "task.yaml")], **options)
    assert result.tasks is not None
    assert result.tasks["tiny"]["acc"] in (0.0, 1.0)
    assert result.tasks["tiny"]["documents"] == 3
    _refused(UsageError, "no such task file", original, None, tiny_lm.TEXT, tasks=["none.yaml"], **options)
    _refused(UsageError, "no task nonsense", original, None, tiny_lm.TEXT, tasks=["nonsense"], **options)


def test_tasks_without_lm_eval(original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr("bitfold.evaluation.fidelity._outcome", None)  # it is found out before anything is run
    _refused(UsageError, "need lm-eval", original, None, tiny_lm.TEXT, tasks=["arc"], context=CONTEXT, max_tokens=128)
