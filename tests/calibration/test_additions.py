"""Where the outputs of layers are added, and what a layer makes up for of such a sum."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

import bitfold
import small_decoders
import tiny_lm
from bitfold import Calibration
from bitfold.calibration import Statistics, walk, walk_shape
from bitfold.calibration.additions import OUTPUT, sums_behind
from bitfold.calibration.statistics import Sums, Wanted

_SMALL = small_decoders.SMALL
_GPT = {"vocab_size": 300, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
_LLAMA = {"self_attn.o_proj": "post_attention_layernorm", "mlp.down_proj": OUTPUT}
CASES: dict[str, tuple[Any, dict[str, str]]] = {
    "llama": (hf.LlamaConfig(**_SMALL), _LLAMA),
    "qwen3": (hf.Qwen3Config(**small_decoders.WIDE), _LLAMA),
    "phi3": (hf.Phi3Config(**_SMALL), _LLAMA),
    # What is normalized or scaled before it is added moves the sum by something else.
    "gemma3": (hf.Gemma3TextConfig(**small_decoders.WIDE, sliding_window=32, sliding_window_pattern=2), {}),
    "granite": (hf.GraniteConfig(**_SMALL, **small_decoders.GRANITE), {}),
    # Both outputs go into one sum.
    "phi": (hf.PhiConfig(**_SMALL, partial_rotary_factor=0.5), {"self_attn.dense": OUTPUT, "mlp.fc2": OUTPUT}),
    "gpt2": (hf.GPT2Config(**_GPT), {"attn.c_proj": "ln_2", "mlp.c_proj": OUTPUT}),
}


@pytest.mark.parametrize("family", CASES)
def test_sums_are_found(family: str) -> None:
    """In every block of a family, whatever its modules are called; layers with a common input have none."""
    torch.manual_seed(0)
    config, expected = CASES[family]
    model: Any = hf.AutoModelForCausalLM.from_config(config).eval()
    ids, handed = torch.arange(2, 42)[None], list[torch.Tensor]()
    for shape in walk_shape(model).chains[0].blocks:
        block = model.get_submodule(shape.path)

        def run(block: nn.Module = block, shape: Any = shape) -> torch.Tensor:
            hook = block.register_forward_hook(lambda _m, _i, answer: handed.append(shape.handed_on(answer)))
            with torch.no_grad():
                model(ids)
            hook.remove()
            return handed.pop()

        groups = [[name.removeprefix(f"{shape.path}.") for name in group] for group in shape.groups]
        found = sums_behind(block, run, groups)
        assert {group[0]: place for group, place in zip(groups, found, strict=True) if place is not None} == expected
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in block.modules())


def _given(rows: int) -> tuple[torch.Tensor, ...]:
    """Inputs in the original model, now; a weight; how far the rest of the sum is off."""
    generator = torch.Generator().manual_seed(rows)
    f = torch.randn(400, 24, generator=generator)
    x = f + 0.3 * torch.randn(400, 24, generator=generator)
    return f, x, torch.randn(rows, 24, generator=generator), torch.randn(400, rows, generator=generator)


@pytest.mark.parametrize("rows", [5, 40])
def test_the_target_makes_up_for_the_whole_sum(rows: int) -> None:
    """At full strength and without damping, W' minimises |W f + r - W' x|^2: checked against lstsq in float64."""
    f, x, w, rest = _given(rows)
    sums = Sums((rows, 24))
    for part in torch.arange(400).split(100):
        lacking = (f[part] - x[part]) @ w.T + rest[part]
        sums.add(x[part], None, None, lacking)
        sums.close()
    found = sums.statistics()
    assert found.cross is None
    best = torch.linalg.lstsq(x.double(), f.double() @ w.double().T + rest.double()).solution.T
    target = found.target(w, 1.0, damp=0.0)
    # The products are sums of 400 terms in float32, and H is conditioned like the inputs, squared.
    bound = 400 * torch.finfo(torch.float32).eps * torch.linalg.cond(x.double()) ** 2 * best.norm()
    assert (target.double() - best).norm() < bound
    half = found.target(w, 0.5, damp=0.0)
    assert (half.double() - (w + best) / 2).norm() < bound


def test_a_sum_of_nothing_else() -> None:
    """Where nothing else is off, the deficit says what the inputs in the original model say."""
    rows = 7
    f, x, w, _ = _given(rows)
    by_deficit, by_inputs = Sums((rows, 24)), Sums((rows, 24))
    by_deficit.add(x, None, None, (f - x) @ w.T)
    by_inputs.add(x, f, None)
    a, b = (sums.statistics().target(w, 0.7, damp=0.02) for sums in (by_deficit, by_inputs))
    assert (a - b).norm() < 400 * torch.finfo(torch.float32).eps * torch.linalg.cond(x) ** 2 * w.norm()


def test_groups_of_windows_add_up() -> None:
    """A part that another process has heard is taken in place of the windows, to the same bits; weights count."""
    f, x, w, rest = _given(6)
    weight = torch.rand(400, 1, generator=torch.Generator().manual_seed(1))
    alone, together, part = Sums((6, 24)), Sums((6, 24)), Sums((6, 24))
    lacking = (f - x) @ w.T + rest
    for sums in (alone, part):
        sums.add(x, None, weight, lacking)
    together.take(part.part())
    ours, theirs = alone.statistics().deficit, together.statistics().deficit
    assert ours is not None
    assert theirs is not None
    assert torch.equal(ours, theirs)
    exact = (lacking * weight).double().T @ x.double() / 400
    assert (ours - exact).abs().max() < 400 * torch.finfo(torch.float32).eps * exact.abs().max()


def test_making_up_for_sums_gains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against making up for the layers' own inputs alone, at two bits, over text that was not calibrated on."""
    torch.manual_seed(0)
    source = tiny_lm.folder(tmp_path / "source", tiny_lm.model())
    (source / "text.txt").write_text(tiny_lm.TEXT[3000:], encoding="utf-8")
    settings = Calibration(str(source / "text.txt"), nsamples=24, seqlen=64)

    def lost(name: str) -> float:
        bitfold.quantize(source, tmp_path / name, format="trellis-2", method="ldlq", calibration=settings)
        found = bitfold.evaluate(str(tmp_path / name), str(source), tiny_lm.TEXT[:3000], context=64, max_tokens=1024)
        assert found.kl_mean is not None
        return found.kl_mean

    with_sums = lost("with")
    monkeypatch.setattr(walk, "sums_behind", lambda _block, _run, groups: [None] * len(groups))
    assert with_sums < 0.97 * lost("without")


def test_wide_layers_go_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer whose inputs are taken in ranges is short of memory: its deficit would be as large as the weight."""
    asked = {"model.layers.0.a": Wanted(True, 256), "model.layers.0.b": Wanted(True), "model.layers.0.c": Wanted(False)}
    model = nn.Module()
    model.model = nn.Module()
    model.model.layers = nn.ModuleList([nn.ModuleDict({name: nn.Linear(2, 2) for name in "abc"})])
    walked = walk.BlockWalk.__new__(walk.BlockWalk)
    walked.model = model
    shape = type("Shape", (), {"path": "model.layers.0"})()
    walked.chain = type("Chain", (), {"blocks": (shape,)})()
    monkeypatch.setattr(walk, "sums_behind", lambda *_: ["x", "y", "z"])
    assert walked._places(0, lambda _i, x: x, [["a"], ["b"], ["c"]], asked.__getitem__) == [None, "y", None]


def test_statistics_are_used_up_where_they_may_be() -> None:
    """The last one who asks gets the room of the deficit."""
    known = Statistics(torch.eye(4), None, 9, deficit=torch.ones(3, 4))
    w = torch.zeros(3, 4)
    first = known.target(w, 1.0, damp=0.0)
    assert known.deficit is not None
    assert torch.equal(known.deficit, torch.ones(3, 4))
    assert torch.equal(known.target(w, 1.0, damp=0.0, last=True), first)
    assert known.deficit is None
