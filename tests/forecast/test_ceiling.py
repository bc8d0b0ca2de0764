"""Runs under a ceiling: kept by spilling, by taking inputs in ranges, and where the system itself holds the limit."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import bitfold
import bitfold.calibration.coding
import tiny_lm
from bitfold import Calibration
from bitfold.calibration import Statistics, Wanted, calibration_tokens
from bitfold.calibration.one_layer import solve
from bitfold.calibration.runner import HESSIANS, Runner
from bitfold.calibration.statistics import Sums
from bitfold.checkpoints import convert
from bitfold.checkpoints.staging import partial_of
from bitfold.errors import CheckpointError, ResourceError, UsageError
from bitfold.forecast.ceiling import NARROWEST
from bitfold.formats import get_format
from bitfold.methods.fits import get_fit
from bitfold.methods.gptq import ldlq, proxy_loss
from bitfold.methods.hessian import BlockDiagonal, column_ranges, diagonal_blocks, product
from bitfold.methods.quantize import quantize_tensor
from bitfold.system import memory
from numerics import check_same_codes

if sys.platform != "win32":
    import resource

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the memory of a process precisely")
WIDE = 2560  # inputs of down_proj: its Hessian takes 26 MB, and factoring it three times as much again
TEXT: dict[str, Any] = {"nsamples": 8, "seqlen": 128}
GPTQ: dict[str, Any] = {"format": "int4-g128", "method": "gptq"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with a very wide layer."""
    folder = tmp_path_factory.mktemp("ceiling") / "source"
    config = LlamaConfig(
        vocab_size=257, hidden_size=128, intermediate_size=WIDE, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=None, eos_token_id=256, pad_token_id=256,
    )  # fmt: skip
    torch.manual_seed(0)
    tiny_lm.folder(folder, LlamaForCausalLM(config).bfloat16())
    (folder / "text.txt").write_text(tiny_lm.TEXT * 4, encoding="utf-8")
    return folder


def text(source: Path, **more: Any) -> Calibration:
    """Enough tokens for the widest layer."""
    return Calibration(str(source / "text.txt"), **TEXT, drift=0.0, fisher=False, **more)


def correlated(k: int, seed: int = 0) -> torch.Tensor:
    """The Hessian of k inputs, mean square 1."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * k, k, generator=generator) @ torch.randn(k, k, generator=generator)
    h = x.T @ x
    return h / h.diagonal().mean()


# The mathematics


def test_ranges_of_columns() -> None:
    """They cover everything, are never wider than allowed, and begin where tiles and groups do."""
    for k, largest in ((14336, 4096), (14336, 3584), (1000, 256), (4096, 4096), (700, None), (9000, 1000)):
        found = column_ranges(k, largest)
        assert [c for part in found for c in range(part.start, part.stop)] == list(range(k))
        assert all(part.stop - part.start <= (largest or k) for part in found)
        assert all(part.start % 256 == 0 for part in found)
    assert len(column_ranges(14336, 3584)) == 4


@pytest.mark.parametrize("name", ["int4-asym-g64", "int3", "nf4", "trellis-2"])
def test_ranges_are_a_block_diagonal_hessian(name: str) -> None:
    """The same codes as under the dense matrix with zeros between the squares."""
    w = torch.randn(40, 512, generator=torch.Generator().manual_seed(1))
    known = BlockDiagonal((correlated(256, 1), correlated(256, 2)))
    dense = torch.block_diag(*known.parts)
    fit, format = get_fit("mse"), get_format(name)
    one, other = (ldlq(w, h, format, fit) for h in (known, dense))
    same = (one.dequantize() == other.dequantize()).float().mean()
    assert same > 0.999  # sums in another order may tip a weight that lies between two codes
    assert proxy_loss(w, one.dequantize(), known) == pytest.approx(proxy_loss(w, one.dequantize(), dense), rel=1e-4)
    assert torch.allclose(product(w, known), w @ dense, atol=1e-4)


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("name", ["int4-asym-g64", "nf4"])
def test_ranges_stand_alone(name: str, order: bool) -> None:
    """Each range is coded as a narrower layer is (factors that are refitted for whole rows apart)."""
    w = torch.randn(40, 512, generator=torch.Generator().manual_seed(1))
    known = BlockDiagonal((correlated(256, 1), correlated(256, 2)))
    fit, format = get_fit("mse"), get_format(name)
    parts = [ldlq(w[:, at], h, format, fit, by_energy=order).fields["codes"] for at, h in diagonal_blocks(known)]
    whole = ldlq(w, known, format, fit, by_energy=order).fields["codes"]
    check_same_codes(whole, torch.cat(parts, 1))


def test_statistics_of_ranges_are_squares_of_the_whole() -> None:
    """On the diagonal the same sums, in the basis that was asked for; the target of each range stands alone."""
    generator = torch.Generator().manual_seed(0)
    x, f = (torch.randn(700, 512, generator=generator) for _ in range(2))
    turn = torch.linalg.qr(torch.randn(512, 512, generator=generator))[0]
    weight = torch.rand(700, 1, generator=generator)
    whole, parts = Sums((4, 512)), Sums((4, 512), Wanted(True, 256, lambda v: v @ turn))
    whole.add(x @ turn, f @ turn, weight)
    parts.add(x, f, weight)
    dense, known = whole.statistics(), parts.statistics()
    assert known.in_basis
    assert not dense.in_basis
    w = torch.randn(4, 512, generator=generator)
    for at, h in diagonal_blocks(known.hessian):
        assert torch.allclose(h, dense.hessian[at, at], atol=1e-4)
        alone = Statistics(h, dense.cross[at, at], 700).target(w[:, at], 0.7, damp=0.02)
        assert torch.allclose(known.target(w, 0.7, damp=0.02)[:, at], alone, atol=1e-3)
    assert Sums((4, 8), Wanted(cross=False)).statistics().cross is None


@pytest.mark.parametrize("name", ["int4-asym-g64", "trellis-2", "int8-tensor", "mxfp4"])
def test_rows_at_a_time_are_the_rows_at_once(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Rows do not know each other, so memory may hold some of them only."""
    w, h = torch.randn(600, 128, generator=torch.Generator().manual_seed(1)), correlated(128)
    fit, format = get_fit("mse"), get_format(name)
    at_once = ldlq(w, h, format, fit).dequantize()
    monkeypatch.setattr(sys.modules["bitfold.methods.gptq"], "WEIGHTS", 256 * 128)
    pieces = ldlq(w, h, format, fit).dequantize()
    assert (at_once == pieces).float().mean() > 0.999
    assert proxy_loss(w, at_once, h) == pytest.approx(proxy_loss(w, pieces, h), rel=1e-3)


# Runs


def down_inputs(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """What enters the first down_proj of a plain model, (tokens, k)."""
    found: list[torch.Tensor] = []
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    layer: nn.Module = model.model.layers[0].mlp.down_proj
    layer.register_forward_pre_hook(lambda _m, inputs: found.append(inputs[0][0].detach()))
    with torch.no_grad():
        for window in ids:
            model(window[None])
    return torch.cat(found)


def test_a_run_in_ranges_is_the_library_s_solution(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under squares of the Hessian of the inputs that the quantized model gives, each range coded by itself."""
    seen: list[tuple[torch.Tensor, Any, torch.Tensor]] = []

    def spy(rule: Any, w: torch.Tensor, hessian: Any, seed: int, name: str, **options: Any) -> Any:
        q, flags = solve(rule, w, hessian, seed, name, **options)
        if "layers.0.mlp.down_proj" in name:
            seen.append((w.clone(), hessian, q.fields["codes"]))
        return q, flags

    monkeypatch.setattr(bitfold.calibration.coding, "solve", spy)
    report = bitfold.quantize(source, tmp_path / "out", **GPTQ, calibration=text(source, columns=NARROWEST))
    assert report.preflight["ranges"] == ["model.layers.0.mlp.down_proj.weight"]
    convert(tmp_path / "out", tmp_path / "plain", dtype="float32")
    x = down_inputs(tmp_path / "plain", calibration_tokens(source, str(source / "text.txt"), **TEXT))
    (w, hessian, codes), scale = seen[0], float(x.square().mean())
    for at, h in diagonal_blocks(hessian):
        assert at.stop - at.start <= NARROWEST
        assert torch.allclose(h, x[:, at].T @ x[:, at] / len(x), atol=1e-4 * scale)
        alone = quantize_tensor(w[:, at], "int4-g128", fit="mse", method="gptq", hessian=h).fields["codes"]
        check_same_codes(codes[:, at.start // 2 : at.stop // 2], alone)
    rounded = quantize_tensor(w, "int4-g128", fit="mse").fields["codes"]
    assert not torch.equal(codes, rounded)


def test_rules_that_cannot_take_ranges(source: Path, tmp_path: Path) -> None:
    """Named, before any work; and never chosen for a ceiling."""
    for options in ({"format": "int4-g128", "fit": "clip", "method": "gptq"}, {**GPTQ, "prune": "wanda:0.5"}):
        with pytest.raises(UsageError, match=r"has 2560 inputs, more than the 1024"):
            bitfold.quantize(source, tmp_path / "out", **options, calibration=text(source, columns=NARROWEST))
        with pytest.raises(ResourceError, match="are not enough") as caught:
            bitfold.quantize(source, tmp_path / "out", **options, calibration=text(source), max_memory=100_000_000)
        assert "in ranges" not in (caught.value.hint or "")
    with pytest.raises(UsageError, match="too narrow"):
        text(source, columns=100)


def stop(_report: object) -> None:
    """Ends a run after its first tensor."""
    raise KeyboardInterrupt


def test_the_ranges_of_an_interrupted_run_stay(source: Path, tmp_path: Path) -> None:
    """The same command goes on with them, with another ceiling or none; asking for other ones is another run."""
    bitfold.quantize(source, tmp_path / "whole", **GPTQ, calibration=text(source, columns=NARROWEST))
    with pytest.raises(KeyboardInterrupt), pytest.warns(UserWarning, match="goes on"):
        bitfold.quantize(source, tmp_path / "out", **GPTQ, calibration=text(source, columns=NARROWEST), on_tensor=stop)
    with pytest.raises(CheckpointError, match="different are calibration"):
        bitfold.quantize(source, tmp_path / "out", **GPTQ, calibration=text(source, columns=2048))
    assert partial_of(tmp_path / "out").is_dir()
    again = bitfold.quantize(source, tmp_path / "out", **GPTQ, calibration=text(source), max_memory=8 << 30)
    assert again.preflight["columns"] == NARROWEST
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out")]
    assert files[0] == files[1]


def test_what_is_free_changes_no_byte(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No ceiling named: a word of caution beyond four fifths of what is free, a refusal beyond all of it, no ranges."""
    monkeypatch.setattr(memory, "resident", lambda: 400_000_000)
    need = bitfold.quantize(source, tmp_path / "out", **GPTQ, calibration=text(source), dry_run=True).preflight
    monkeypatch.setattr(memory, "available", lambda: int(1.1 * (need["peak_memory"] - 400_000_000)))
    said: list[str] = []
    monkeypatch.setattr("bitfold.system.progress.say", said.append)
    tight = bitfold.quantize(source, tmp_path / "out", **GPTQ, calibration=text(source)).preflight
    assert tight["columns"] is None
    assert tight["allowed"] < tight["peak_memory"]
    assert any("80% of what is free" in line for line in said)
    monkeypatch.setattr(memory, "available", lambda: 10_000_000)
    with pytest.raises(ResourceError, match="are left") as caught:
        bitfold.quantize(source, tmp_path / "other", **GPTQ, calibration=text(source))
    assert "--max-memory" in (caught.value.hint or "")


def test_experts_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With no room for more than one Hessian the codes are those of a run that holds them all."""
    config = MixtralConfig(
        vocab_size=257, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2, max_position_embeddings=128,
        bos_token_id=None, eos_token_id=256, pad_token_id=256,
    )  # fmt: skip
    torch.manual_seed(0)
    source = tiny_lm.folder(tmp_path / "source", MixtralForCausalLM(config))
    (source / "text.txt").write_text(tiny_lm.TEXT, encoding="utf-8")
    settings = Calibration(str(source / "text.txt"), nsamples=4, seqlen=64, fisher=False)
    passes: list[int] = []
    measure = Runner.measure_experts

    def counted(walk: Runner, *args: Any) -> Any:
        passes.append(walk._hessian_bytes)
        return measure(walk, *args)

    monkeypatch.setattr(Runner, "measure_experts", counted)
    options: dict[str, Any] = {"format": "int4-g32", "method": "ldlq", "calibration": settings}
    bitfold.quantize(source, tmp_path / "all", **options)
    monkeypatch.setattr(memory, "default_ceiling", lambda: 1)
    report = bitfold.quantize(source, tmp_path / "one", **options)
    assert set(passes) == {HESSIANS, 1}
    assert all(t.output_error is not None for t in report.quantized)
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("all", "one")]
    assert files[0].keys() == files[1].keys()
    for name, tensor in files[0].items():
        check_same_codes(files[1][name], tensor)


# Where the system holds the limit


def own_group() -> Path | None:
    """A new control group of memory below the one of this process; None where none can be made."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(",") or controllers == "":
            root = Path("/sys/fs/cgroup") / ("memory" if controllers else "")
            group = root / path.lstrip("/") / f"bitfold-{os.getpid()}"
            with contextlib.suppress(OSError):
                group.mkdir()
                limit = group / ("memory.limit_in_bytes" if controllers else "memory.max")
                if limit.is_file() and os.access(limit, os.W_OK):
                    return group
                group.rmdir()
    return None


@contextlib.contextmanager
def held(limit: int) -> Iterator[Callable[[], None]]:
    """A limit that the system holds; yields what a child calls to be under it.

    A control group where one can be made: the kernel then kills what is larger. Elsewhere RLIMIT_DATA: memory that the
    process can write to and shares with nobody, touched or not; beyond it, asking for more fails. Not RLIMIT_AS, which
    counts what no memory stands behind (code of libraries, reserved arenas, mapped files: twice the memory before any
    work), nor RLIMIT_RSS, which Linux does not heed.
    """
    group = None if "BITFOLD_RLIMIT" in os.environ else own_group()
    if group is None:
        yield lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        return
    version_1 = group / "memory.limit_in_bytes"
    try:
        (version_1 if version_1.is_file() else group / "memory.max").write_text(str(limit))
        swap = group / ("memory.swappiness" if version_1.is_file() else "memory.swap.max")
        if swap.is_file():
            swap.write_text("0")
        yield lambda: (group / "cgroup.procs").write_text("0") and None
    finally:
        group.rmdir()


def command(source: Path, out: Path, kind: str, *more: str) -> list[str]:
    """The command line of a run."""
    made = [sys.executable, "-m", "bitfold", "quantize", str(source), "-o", str(out), "--format", "int4-g128"]
    if kind == "calibrated":
        made += ["--method", "gptq", "--calibration", str(source / "text.txt"), "--nsamples", "8", "--seqlen", "128"]
    return [*made, "--json", *more]


def run(command: list[str], **how: Any) -> subprocess.CompletedProcess[str]:
    """In a fresh process with one thread."""
    one = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=one, **how)


NEEDED = """
import sys
import bitfold
from bitfold import Calibration
text = Calibration(sys.argv[1] + "/text.txt", nsamples=8, seqlen=128, drift=0.0, fisher=False)
for options in ({}, {"method": "gptq", "calibration": text}):
    print(bitfold.quantize(sys.argv[1], "out", format="int4-g128", **options, dry_run=True).preflight["peak_memory"])
"""


@pytest.fixture(scope="module")
def needed(source: Path) -> dict[str, int]:
    """Bytes that a run takes, as it is estimated in a fresh process."""
    done = run([sys.executable, "-c", NEEDED, str(source)])
    assert done.returncode == 0, done.stderr
    return dict(zip(("data-free", "calibrated"), map(int, done.stdout.split()), strict=True))


@LINUX
@pytest.mark.parametrize("kind", ["data-free", "calibrated"])
def test_under_a_hard_limit(source: Path, tmp_path: Path, needed: dict[str, int], kind: str) -> None:
    """`--max-memory X` where X is all that the system gives: it ends well, and says how much it took.

    Calibrated, X is less than the run takes with the Hessian of the widest layer whole, so inputs are taken in ranges.
    """
    ceiling = needed[kind] + (-50_000_000 if kind == "calibrated" else 40_000_000)
    with held(ceiling) as enter:
        done = run(command(source, tmp_path / "out", kind, "--max-memory", str(ceiling)), preexec_fn=enter)
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout)
        assert report["peak_memory"] <= ceiling
        assert (report["preflight"]["columns"] is not None) == (kind == "calibrated")
        # The limit is one: a process that wants more than that does not get it.
        more = f"bytearray({ceiling} + (50 << 20))[::4096]; print('got it')"
        assert "got it" not in run([sys.executable, "-c", more], preexec_fn=enter).stdout
