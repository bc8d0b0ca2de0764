"""Adapters rounded into the formats of their base: what it costs, what stays, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import bitfold
import tiny_lm
from bitfold.calibration.resume import Bookmarks
from bitfold.checkpoints.bitfold_folder import QuantizedSource
from bitfold.checkpoints.manifest import verify
from bitfold.errors import CheckpointError, ResourceError, UsageError
from bitfold.models.load import load_folder
from bitfold.run import merging
from bitfold.run.merging import merge
from bitfold.text.answers import told_apart
from bitfold.training.finetune import finetune
from bitfold.training.options import Finetuning
from bitfold.training.texts import held_out_first

peft = pytest.importorskip("peft")

# Scales of groups and of rows, a second level of scales, rotations, rounded activations.
BASES: dict[str, dict[str, Any]] = {
    "nf4-g32-dq": {},
    "int4-asym-g32": {},
    "int8": {"act": "int8"},
    "trellis-3": {"transform": "hadamard"},
    "e8p": {"transform": "hadamard"},
    "mxfp4": {},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_lm.folder(tmp_path_factory.mktemp("merged") / "source", tiny_lm.model())
    (folder / "text.txt").write_text(tiny_lm.TEXT, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def base(source: Path) -> Path:
    bitfold.quantize(source, source.with_name("base"), format="int4-asym-g32")
    return source.with_name("base")


@pytest.fixture(scope="module")
def adapter(source: Path, base: Path) -> Path:
    train(source, base, source.with_name("adapter"), targets=("q_proj", "down_proj"))
    return source.with_name("adapter")


def train(source: Path, base: Path, out: Path, **more: Any) -> None:
    how = {"steps": 20, "seqlen": 48, "batch": 2, "rank": 4, "rate": 1e-2, **more}
    finetune(base, out, Finetuning(str(source / "text.txt"), **how))


@pytest.mark.parametrize("name", BASES)
def test_every_kind_of_format(source: Path, tmp_path: Path, name: str) -> None:
    """Nearly all that was learned is there without the adapter, in the formats of the base."""
    bitfold.quantize(source, tmp_path / "base", format=name, **BASES[name])
    train(source, tmp_path / "base", tmp_path / "adapter")
    found = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", str(source / "text.txt"))
    assert found.fallbacks == []
    assert found.loss_adapter < found.loss_base - 1
    assert found.loss_merged < found.loss_adapter + 0.05 * (found.loss_base - found.loss_adapter)
    assert found.tensors == 14
    before, after = (QuantizedSource(tmp_path / f).entries for f in ("base", "out"))
    assert {n: e.to_dict() for n, e in before.items()} == {n: e.to_dict() for n, e in after.items()}
    assert verify(tmp_path / "out").problems == []
    assert "merged: held-out loss" in (tmp_path / "out" / "README.md").read_text()
    assert bitfold.load(tmp_path / "out").generate(torch.tensor([[1, 2]]), max_new_tokens=2).shape == (1, 4)


def test_what_has_no_adapter_stays_bit_by_bit(source: Path, base: Path, adapter: Path, tmp_path: Path) -> None:
    merge(base, adapter, tmp_path / "out", str(source / "text.txt"))
    before, after = (load_folder(folder).state_dict() for folder in (base, tmp_path / "out"))
    changed = {
        name.rsplit(".", 2)[0].rpartition(".")[2] for name in before if not torch.equal(before[name], after[name])
    }
    assert changed == {"q_proj", "down_proj"}


def test_an_adapter_of_pefts_own_beside_a_plain_weight(source: Path, base: Path, tmp_path: Path) -> None:
    """What is not packed takes the sum as it is: base and adapter together, to the rounding of its dtype."""
    model = peft.get_peft_model(load_folder(base), peft.LoraConfig(r=4, target_modules=["lm_head"], use_rslora=True))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.02, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(tmp_path / "adapter")  # with the head as it is in the base, which is not looked at
    ids = torch.arange(1, 40)[None]
    found = merge(base, tmp_path / "adapter", tmp_path / "out", str(source / "text.txt"))
    if "lm_head.weight" not in QuantizedSource(base).entries:
        expected, merged = model.eval()(ids).logits, load_folder(tmp_path / "out")(ids).logits
        assert torch.allclose(expected, merged, atol=1e-2 * float(expected.abs().max()))
    assert abs(found.cost) < 0.02


def test_what_is_refused(source: Path, base: Path, adapter: Path, tmp_path: Path) -> None:
    """No adapter, one that is more than LoRA, one of another base, one that is damaged; nothing is left behind."""
    text, out = str(source / "text.txt"), tmp_path / "out"
    with pytest.raises(CheckpointError, match="is no adapter"):
        merge(base, source, out, text)

    def changed(name: str, config: dict[str, Any], rename: tuple[str, str] = ("", "")) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        said = json.loads((adapter / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**said, **config}))
        stored = load_file(adapter / "adapter_model.safetensors")
        save_file({n.replace(*rename): w for n, w in stored.items()}, folder / "adapter_model.safetensors")
        return folder

    for key, value in {"use_dora": True, "peft_type": "IA3", "bias": "all", "alpha_pattern": {"q_proj": 3}}.items():
        with pytest.raises(UsageError, match=f"cannot be merged: {key}"):
            merge(base, changed(key, {key: value}), out, text)
    with pytest.raises(UsageError, match="the base has no weight"):
        merge(base, changed("named", {}, ("q_proj", "c_attn")), out, text)
    with pytest.raises(UsageError, match="in the base"):
        merge(base, changed("shaped", {}, ("down_proj", "up_proj")), out, text)
    with pytest.raises(CheckpointError, match="missing or misshapen"):
        merge(
            base,
            changed("torn", {}, ("layers.0.self_attn.q_proj.lora_B", "layers.0.self_attn.x_proj.lora_B")),
            out,
            text,
        )
    with pytest.raises(ResourceError, match="are allowed"):
        merge(base, adapter, out, text, max_memory=1 << 20)
    with pytest.raises(CheckpointError, match="was not written by bitfold"):
        merge(source, adapter, out, text)
    assert not out.exists()


def test_another_text_is_said(source: Path, base: Path, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text(tiny_lm.TEXT[::-1], encoding="utf-8")
    with pytest.warns(UserWarning, match="is another text"):
        merge(base, adapter, tmp_path / "out", str(tmp_path / "other.txt"))


def test_another_base_is_said(source: Path, adapter: Path, tmp_path: Path) -> None:
    """Of the same shapes, so that it can be done."""
    bitfold.quantize(source, tmp_path / "other", format="nf4-g32")
    with pytest.warns(UserWarning, match="was trained on another base \\(base\\)"):
        merge(tmp_path / "other", adapter, tmp_path / "out", str(source / "text.txt"))


def test_of_conversations_only_answers_are_learned_and_judged(base: Path, tmp_path: Path) -> None:
    """The loss is that of the answers' tokens, whatever the questions are; merging judges by the same."""
    rows = [{"prompt": f"{7919 * i % 9973} {104729 * i % 99991}?", "completion": "fox"} for i in range(60)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    how = {"steps": 12, "seqlen": 48, "batch": 2, "rank": 4, "rate": 1e-2}
    text = str(tmp_path / "rows.jsonl")
    alone, all_of_it = (
        finetune(base, tmp_path / name, Finetuning(text, **how, answers_only=alone))
        for name, alone in (("alone", True), ("all", False))
    )
    ids, held_out = held_out_first(base, text, None, 1 << 16, 48, answers_only=True)
    ids, said = told_apart(ids[:held_out])
    logits = load_folder(base, dtype=torch.float32)(ids).logits[:, :-1].log_softmax(-1)
    surprise = -logits.gather(2, ids[:, 1:, None])[..., 0]
    assert alone.loss_before == pytest.approx(float(surprise[said[:, 1:]].mean()), rel=0.02)  # finetune may use bf16
    assert alone.loss_after < 0.5 * alone.loss_before
    assert alone.loss_after < 0.5 * all_of_it.loss_after  # the questions cannot be learned
    found = merge(base, tmp_path / "alone", tmp_path / "out", text)
    assert found.loss_adapter == pytest.approx(alone.loss_after, rel=0.05)


def test_a_merge_that_was_cut_short_goes_on_to_the_same_bytes(
    source: Path, base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the first block: what it has finished is not done again, nor what was measured before."""
    text, turn = str(source / "text.txt"), Bookmarks.turn

    def cut_short(marks: Bookmarks, index: int, tensors: list[str], walk: Any) -> None:
        turn(marks, index, tensors, walk)
        raise KeyboardInterrupt

    whole = merge(base, adapter, tmp_path / "whole", text)
    monkeypatch.setattr(Bookmarks, "turn", cut_short)
    with pytest.raises(KeyboardInterrupt), pytest.warns(match="the same command goes on"):
        merge(base, adapter, tmp_path / "out", text)
    assert not (tmp_path / "out").exists()
    solved: list[str] = []
    measured = merging._loss
    monkeypatch.setattr(Bookmarks, "turn", lambda m, i, t, w: (solved.extend(t), turn(m, i, t, w))[1])
    monkeypatch.setattr(merging, "_loss", lambda *given: (solved.append("loss"), measured(*given))[1])
    found = merge(base, adapter, tmp_path / "out", text)
    assert sorted(solved) == ["loss"] + [f"model.layers.1.{n}.weight" for n in ("mlp.down_proj", "self_attn.q_proj")]
    assert (found.loss_base, found.loss_merged) == (whole.loss_base, whole.loss_merged)
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()
    assert verify(tmp_path / "out").problems == []
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
