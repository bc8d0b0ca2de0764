"""What fails while a run is calibrated: something else is done, it is said, the exception is kept."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import bitfold
import tiny_lm
from bitfold import Calibration
from bitfold.calibration import coding, fisher, inputs, session
from bitfold.calibration.fallback import recoverable
from bitfold.calibration.runner import Runner
from bitfold.calibration.walk import BlockWalk
from bitfold.calibration.whole import WholeWalk
from bitfold.errors import CheckpointError, ResourceError
from bitfold.workspace.folder import partial_of

OPTIONS: dict[str, Any] = {"format": "int4-g32", "method": "ldlq"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model and a text."""
    folder = tiny_lm.folder(tmp_path_factory.mktemp("fallbacks") / "source", tiny_lm.model())
    (folder / "text.txt").write_text(tiny_lm.TEXT, encoding="utf-8")
    return folder


def text(source: Path, **more: Any) -> Calibration:
    """A little of it."""
    return Calibration(str(source / "text.txt"), nsamples=4, seqlen=32, **more)


class Stopped(BaseException):
    """Raised in the middle, as a signal is."""


def fail(*_args: Any, **_options: Any) -> Any:
    """What a model's own code may come up with."""
    raise IndexError("nobody thought of this")


def test_gradients_that_cannot_be_had(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run goes on without token weights: the bytes of one that never wanted them."""
    monkeypatch.setattr(inputs, "token_weights", fail)
    report = bitfold.quantize(source, tmp_path / "out", **OPTIONS, calibration=text(source))
    (fallback,) = report.fallbacks
    assert fallback["where"] == "token weights"
    assert "nobody thought of this" in fallback["why"]
    assert "in fail" in fallback["exception"]
    bitfold.quantize(source, tmp_path / "plain", **OPTIONS, calibration=text(source, fisher=False))
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "plain")]
    assert files[0] == files[1]
    record = json.loads((tmp_path / "out" / "bitfold_report.json").read_text())
    assert "nobody thought of this" in json.dumps(record)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_gradients_of_a_model_that_is_certain_of_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """A float16 norm 60000 times too large: p - label is zero, and so would the Hessians have been, and the weights.

    In bfloat16 some of its logits tie, so that it is not certain of those tokens; whichever way, the weights are whole.
    """
    monkeypatch.setattr(inputs, "fast_dtype", lambda: dtype)
    model = tiny_lm.model()
    model.get_parameter("model.norm.weight").data.mul_(60000)
    source = tiny_lm.folder(tmp_path / "source", model.half())
    (source / "text.txt").write_text(tiny_lm.TEXT, encoding="utf-8")
    report = bitfold.quantize(source, tmp_path / "out", bits=4, calibration=text(source))
    if dtype == torch.float32:
        (fallback,) = report.fallbacks
        assert "certain of the text" in fallback["why"]
    assert all(t.error is not None and t.error < 0.2 and not t.flags for t in report.quantized)


@pytest.mark.parametrize(
    ("weights", "one_sided"),
    [([1.0] * 200, False), ([0.0] * 200, True), ([50.0] + [1e-4] * 199, True), ([float("nan")] * 200, True)],
)
def test_weights_of_nearly_no_token(weights: list[float], one_sided: bool) -> None:
    assert fisher.one_sided(torch.tensor(weights)) == one_sided


def test_inputs_that_are_all_zero(tmp_path: Path) -> None:
    """They say nothing about the weight, which is rounded as it is."""
    model = tiny_lm.model()
    model.get_parameter("model.layers.0.mlp.up_proj.weight").data.zero_()
    source = tiny_lm.folder(tmp_path / "source", model)
    (source / "text.txt").write_text(tiny_lm.TEXT, encoding="utf-8")
    report = bitfold.quantize(source, tmp_path / "out", **OPTIONS, calibration=text(source))
    (found,) = (t for t in report.tensors if t.tensor == "model.layers.0.mlp.down_proj.weight")
    assert found.flags == ("quantized without data: its inputs are all zero under the calibration text",)
    assert found.error is not None
    assert found.error < 0.05


def test_one_layer_that_cannot_be_solved(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is rounded without data, and the layers after it see what it has become."""
    solve = coding.solve

    def failing(scheme: Any, w: Any, hessian: Any, *args: Any, **options: Any) -> Any:
        if hessian is not None and len(hessian) == 96:  # the inputs of down_proj
            fail()
        return solve(scheme, w, hessian, *args, **options)

    monkeypatch.setattr(coding, "solve", failing)
    log = tmp_path / "events.jsonl"
    report = bitfold.quantize(source, tmp_path / "out", **OPTIONS, calibration=text(source, fisher=False), events=log)
    assert len(report.fallbacks) == 2
    flagged = {t.tensor.split(".")[-2] for t in report.flagged}
    assert flagged == {"down_proj"}
    assert sum(t.output_error is not None for t in report.quantized) == 12
    events = [json.loads(line) for line in log.read_text().splitlines()]
    assert sum(e["event"] == "fallback" and "IndexError" in e["exception"] for e in events) == 2
    bitfold.load(tmp_path / "out")
    with pytest.raises(IndexError):
        bitfold.quantize(source, tmp_path / "strict", **OPTIONS, calibration=text(source, fisher=False), strict=True)


def test_a_block_that_stops_running(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After hours in it: what is done stays calibrated, what is left is solved while the whole model runs."""
    measure, seen = Runner.measure, list[str]()

    def failing(self: Runner, layer: str, *args: Any, **options: Any) -> Any:
        seen.append(layer)
        return fail() if len(seen) == 6 else measure(self, layer, *args, **options)

    monkeypatch.setattr(Runner, "measure", failing)
    report = bitfold.quantize(source, tmp_path / "out", **OPTIONS, calibration=text(source, fisher=False))
    (fallback,) = report.fallbacks
    assert fallback["where"] == "model.layers"
    assert "while the whole model runs" in fallback["instead"]
    assert sum(t.output_error is not None for t in report.quantized) == len(report.quantized) == 14
    assert torch.isfinite(bitfold.load(tmp_path / "out")(torch.arange(9)[None]).logits).all()


@pytest.mark.parametrize("why", ["it fails, too", "no room"])
def test_nor_does_the_whole_model(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    """What is done stays calibrated, what is left is rounded."""
    measure, seen = Runner.measure, list[str]()

    def failing(self: Runner, layer: str, *args: Any, **options: Any) -> Any:
        seen.append(layer)
        return fail() if len(seen) == 6 else measure(self, layer, *args, **options)

    monkeypatch.setattr(Runner, "measure", failing)
    if why == "no room":
        monkeypatch.setattr(session.memory, "default_ceiling", lambda: 1 << 20)
        monkeypatch.setattr(session, "_walk_whole", lambda *_: pytest.fail("there is no room"))
    else:
        monkeypatch.setattr(session.WholeWalk, "start", fail)
    report = bitfold.quantize(source, tmp_path / "out", **OPTIONS, calibration=text(source, fisher=False))
    assert [f["where"] for f in report.fallbacks] == ["model.layers", "the whole model"][: 1 + (why != "no room")]
    calibrated = {t.tensor for t in report.quantized if t.output_error is not None}
    assert sum(name.startswith("model.layers.0.") for name in calibrated) == 7
    assert len(calibrated) < len(report.quantized) == 14
    assert torch.isfinite(bitfold.load(tmp_path / "out")(torch.arange(9)[None]).logits).all()


def test_stopped_while_the_whole_model_runs_instead(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process fails at the same block, and goes on with what is left: the bytes of a run in one go."""
    blocks = WholeWalk.block
    monkeypatch.setattr(BlockWalk, "block", _failing_at(BlockWalk.block, 1, fail))
    bitfold.quantize(source, tmp_path / "whole", **OPTIONS, calibration=text(source, fisher=False))

    def stopped(self: WholeWalk, *args: Any, **options: Any) -> Any:
        for number, one in enumerate(blocks(self, *args, **options)):
            if number == 2:
                raise Stopped
            yield one

    monkeypatch.setattr(WholeWalk, "block", stopped)
    with pytest.raises(Stopped), pytest.warns(UserWarning, match="goes on"):
        bitfold.quantize(source, tmp_path / "out", **OPTIONS, calibration=text(source, fisher=False))
    monkeypatch.setattr(WholeWalk, "block", blocks)
    bitfold.quantize(source, tmp_path / "out", **OPTIONS, calibration=text(source, fisher=False))
    digests = [hashlib.sha256((tmp_path / n / "model.safetensors").read_bytes()).digest() for n in ("out", "whole")]
    assert digests[0] == digests[1]


def _failing_at(block: Any, number: int, fail: Any) -> Any:
    return lambda self, index, *args, **options: fail() if index == number else block(self, index, *args, **options)


FINAL = [
    MemoryError(),
    CheckpointError("full"),
    ResourceError("much"),
    OSError(28, "full"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory"),
]


@pytest.mark.parametrize("error", FINAL, ids=lambda error: type(error).__name__)
def test_what_is_no_failure_of_calibration(error: Exception) -> None:
    """Memory, disks and damaged files end a run: going on would not mend them."""
    with pytest.raises(type(error)):
        recoverable(error)
    assert isinstance(recoverable(ValueError("x")), ValueError)


@pytest.mark.parametrize("window", [0, 2])
def test_windows_are_not_weighed_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: int
) -> None:
    """Stopped while tokens are weighed, a run loses the window at hand and no byte."""
    bitfold.quantize(source, tmp_path / "whole", **OPTIONS, calibration=text(source))
    backward, seen = fisher.there_and_back, list[int]()

    def counted(*args: Any) -> None:
        seen.append(len(seen))
        if len(seen) == window + 1 and stopping:
            raise Stopped
        backward(*args)

    monkeypatch.setattr(fisher, "there_and_back", counted)
    stopping = True
    with pytest.raises(Stopped), pytest.warns(UserWarning, match="goes on"):
        bitfold.quantize(source, tmp_path / "out", **OPTIONS, calibration=text(source))
    kept = list((partial_of(tmp_path / "out") / "state").glob("weights-*"))
    assert len(kept) == window
    seen.clear()
    stopping = False
    bitfold.quantize(source, tmp_path / "out", **OPTIONS, calibration=text(source))
    assert len(seen) == 4 - window
    digests = [hashlib.sha256((tmp_path / n / "model.safetensors").read_bytes()).digest() for n in ("out", "whole")]
    assert digests[0] == digests[1]


def test_a_weight_that_was_moved_on_purpose_is_not_flagged(source: Path, tmp_path: Path) -> None:
    """8 bits behind 2: the drift correction moves the weight by far more than its codes lose."""
    rules = bitfold.Recipe(
        (bitfold.Rule("*.layers.0.*", "int2-g32", "ldlq"), bitfold.Rule("*_proj.weight", "int8", "ldlq"))
    )
    report = bitfold.quantize(source, tmp_path / "out", recipe=rules, calibration=text(source, drift=1.0, fisher=False))
    fine = [t for t in report.quantized if ".layers.1." in t.tensor]
    assert max(t.error for t in fine if t.error is not None) > 1e-3
    assert not [t.flags for t in fine if t.flags]
