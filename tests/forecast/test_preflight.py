"""What is said before a run, held against the run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import bitfold
import tiny_lm
from bitfold import Calibration
from bitfold.errors import ResourceError
from bitfold.forecast.preflight import Preflight, refuse_impossible
from bitfold.system import memory
from bitfold.system.memory import _group_available

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the memory of a process precisely")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough that memory and time are those of the work: a block of 31 MB, inputs of 1536."""
    folder = tmp_path_factory.mktemp("preflight") / "source"
    config = LlamaConfig(
        vocab_size=257, hidden_size=640, intermediate_size=1536, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=256, bos_token_id=None, eos_token_id=256, pad_token_id=256,
    )  # fmt: skip
    torch.manual_seed(0)
    tiny_lm.folder(folder, LlamaForCausalLM(config).bfloat16())
    (folder / "text.txt").write_text(tiny_lm.TEXT * 4, encoding="utf-8")
    return folder


RUN = """
import json, sys, time
import torch
torch.set_num_threads(1)
import bitfold
from bitfold import Calibration
options = json.loads(sys.argv[3])
if "calibration" in options:
    options["calibration"] = Calibration(**options["calibration"])
plan = bitfold.quantize(sys.argv[1], sys.argv[2], **options, dry_run=True)
before = time.process_time()
report = bitfold.quantize(sys.argv[1], sys.argv[2], **options)
seconds = time.process_time() - before
print(json.dumps([report.preflight, plan.preflight["seconds"], seconds, report.peak_memory]))
"""


def measured(source: Path, out: Path, options: dict[str, Any]) -> tuple[dict[str, Any], float, float, int]:
    """The estimate, seconds announced, and what a fresh process needed with one thread: seconds of work, and bytes."""
    command = [sys.executable, "-c", RUN, str(source), str(out), json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: tuple[dict[str, Any], float, float, int] = tuple(json.loads(done.stdout.splitlines()[-1]))
    return found


def calibrated(source: Path) -> dict[str, Any]:
    """Options of a calibrated run."""
    text = {"text": str(source / "text.txt"), "nsamples": 8, "seqlen": 128, "fisher": False}
    return {"format": "int4-g64", "method": "ldlq", "calibration": text}


@LINUX
@pytest.mark.parametrize("kind", ["data-free", "calibrated"])
def test_estimates_are_near_the_truth(source: Path, tmp_path: Path, kind: str) -> None:
    """Size exact, memory within a fifth, time within a factor of two, at the first try.

    Time is that of the processor: on a machine with other work it is what the estimate is about, see timing.py. Work
    that begins between the two shares its caches, so they may be asked again; what is wrong is wrong each time.
    """
    options = {"format": "int4-asym-g64"} if kind == "data-free" else calibrated(source)
    for turn in range(3):
        found, announced, seconds, peak = measured(source, tmp_path / str(turn), options)
        if seconds / 2 <= announced <= 2 * seconds:
            break
    size = sum(f.stat().st_size for f in (tmp_path / "0").glob("*.safetensors"))
    assert found["output_bytes"] == size
    assert 0.8 * peak <= found["peak_memory"] <= 1.2 * peak
    assert seconds / 2 <= announced <= 2 * seconds, f"{announced:.1f} s were announced, {seconds:.1f} s it took"


def test_what_is_said(source: Path, tmp_path: Path) -> None:
    """What is kept and by which rule, ragged groups, who loads the result."""
    plan = bitfold.quantize(source, tmp_path / "out", format="int4-g96", ignore=["*down_proj"], dry_run=True)
    found = plan.preflight
    assert found["kept"]["kept by the rule '*down_proj'"]["tensors"] == 2
    assert found["kept"]["embedding, kept by default"] == {"tensors": 1, "bytes": 257 * 640 * 2}
    assert sum(part["bytes"] for part in found["kept"].values()) == sum(t.bytes_before for t in plan.kept)
    assert len(found["ragged"]) == 12  # 640 is no multiple of 96
    assert found["bpw_whole"] == pytest.approx(plan.bpw_whole)
    assert found["engines"]["bitfold"] == "yes"
    assert found["engines"]["llama.cpp"].startswith("no: it reads GGUF")
    assert not (tmp_path / "out").exists()


def test_a_ceiling_that_cannot_be_kept(source: Path, tmp_path: Path) -> None:
    """Refused before any work, with the smallest that can, which then does."""
    options = {**calibrated(source), "calibration": Calibration(**calibrated(source)["calibration"])}
    with pytest.raises(ResourceError, match=r"are not enough: solving model\.layers\.0") as caught:
        bitfold.quantize(source, tmp_path / "out", **options, max_memory=100_000_000)
    assert "smallest ceiling that works is about" in (caught.value.hint or "")
    assert list(tmp_path.iterdir()) == []


CAPPED = """
import sys, warnings
import torch
torch.set_num_threads(1)
import bitfold
from bitfold import Calibration
text = Calibration(sys.argv[1] + "/text.txt", nsamples=8, seqlen=128, fisher=False)
options = dict(format="int4-g64", method="ldlq", calibration=text)
from bitfold.system.units import parse_size
need = bitfold.quantize(sys.argv[1], sys.argv[2], **options, dry_run=True).preflight["peak_memory"]
ceiling = int(1.1 * need)  # the dry run itself has made the process larger
report = bitfold.quantize(sys.argv[1], sys.argv[2], **options, max_memory=ceiling)
print(report.peak_memory <= ceiling)
"""


@LINUX
def test_the_smallest_ceiling_is_kept(source: Path, tmp_path: Path) -> None:
    """Under what the estimate names, checked after every tensor and at the end."""
    done = subprocess.run(
        [sys.executable, "-c", CAPPED, str(source), str(tmp_path / "out")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True"]


@LINUX
def test_a_broken_ceiling_is_an_error() -> None:
    """Should an estimate ever be wrong: not silently."""
    ceiling = memory.Ceiling(memory.resident() // 2)
    ceiling._before = 0
    with pytest.raises(ResourceError, match="are allowed"):
        ceiling.check()
    memory.Ceiling(1 << 50).check()


def test_no_room_on_the_disk(tmp_path: Path) -> None:
    """Refused before any work; what an interrupted run has written already counts as room."""
    huge = Preflight(1 << 60, 1 << 60, 1, "nothing", None, 4.0)
    with pytest.raises(ResourceError, match="of room"):
        refuse_impossible(huge, tmp_path / "out", None)
    refuse_impossible(huge, tmp_path / "out", None, has=1 << 60)


def test_control_groups(tmp_path: Path) -> None:
    """The tightest limit on the way up counts, cached files do not."""
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    for folder, limit, used in ((tmp_path / "a", "1000", "700"), (inner, "max", "500")):
        (folder / "memory.max").write_text(limit)
        (folder / "memory.current").write_text(used)
        (folder / "memory.stat").write_text("anon 1\ninactive_file 200\n")
    listing = tmp_path / "cgroup"
    listing.write_text("0::/a/b\n")
    assert _group_available(tmp_path, listing) == 500
    listing.write_text("0::/none\n")
    assert _group_available(tmp_path, listing) is None
