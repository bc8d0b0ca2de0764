"""Runs on a Ray cluster of three machines that are all this one: the same bytes, whatever happens to machines."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import bitfold
import tiny_lm
from bitfold.errors import ResourceError
from executor_runs import content, model, started, wait_for, written

ray = pytest.importorskip("ray", reason="ray is not installed: `make test-ray` installs and runs it")

TRELLIS = {"format": "trellis-4", "method": "rtn", "transform": "hadamard"}
METHODS: dict[str, dict[str, Any]] = {
    "rtn": {"bits": 3, "method": "rtn"},
    "trellis": TRELLIS,
    "gptq": {"bits": 4, "method": "gptq"},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    for _ in range(2):
        found.add_node(num_cpus=1)
    found.wait_for_nodes()
    yield found
    found.shutdown()


@pytest.mark.parametrize("options", METHODS.values(), ids=METHODS.keys())
def test_same_bytes_as_here(cluster: Any, source: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    if options["method"] == "gptq":
        source = tiny_lm.folder(tmp_path / "source", tiny_lm.model())
        (source / "text.txt").write_text(tiny_lm.TEXT)
        options = {**options, "calibration": bitfold.Calibration(str(source / "text.txt"), nsamples=10, seqlen=32)}
    here = bitfold.quantize(source, tmp_path / "here", **options)
    there = bitfold.quantize(source, tmp_path / "there", executor=f"ray:{cluster.address}", **options)
    assert content(tmp_path / "here") == content(tmp_path / "there")
    assert here.tensors == there.tensors


def test_evaluation(cluster: Any, tmp_path: Path) -> None:
    """The windows are read on all machines: the same numbers."""
    source = tiny_lm.folder(tmp_path / "source", tiny_lm.model())
    changed = tiny_lm.folder(tmp_path / "changed", tiny_lm.disturbed(tiny_lm.model(), 0.02))
    given: dict[str, Any] = {"text": tiny_lm.TEXT, "context": 64, "max_tokens": 5 * 64 + 9}
    here = bitfold.evaluate(changed, source, **given)
    there = bitfold.evaluate(changed, source, **given, executor=f"ray:{cluster.address}")
    assert (there.perplexity, there.kl_mean, there.top1) == (here.perplexity, here.kl_mean, here.top1)


def test_a_machine_and_the_driver_are_lost_in_the_middle(cluster: Any, source: Path, tmp_path: Path) -> None:
    """Nothing that was finished is done again."""
    out, quiet = tmp_path / "out", tmp_path / "quiet"
    flags = [text for name, value in TRELLIS.items() for text in (f"--{name}", value)]
    flags += ["--executor", f"ray:{cluster.address}"]
    driver = started(source, out, *flags)
    wait_for(lambda: len(written(out)) >= 2)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    before = written(out)
    driver = started(source, out, *flags)
    wait_for(lambda: len(written(out)) > len(before) or driver.poll() is not None)
    lost = cluster.add_node(num_cpus=1) if driver.poll() is not None else cluster.list_all_nodes()[-1]
    cluster.remove_node(lost, allow_graceful=False)
    said = driver.communicate(timeout=300)[1]
    assert driver.returncode == 0, said
    assert f"going on: {len(before)} of" in said
    bitfold.quantize(source, quiet, **TRELLIS)  # type: ignore[arg-type]
    assert content(out) == content(quiet)


def test_no_cluster_there(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="cannot be reached"):
        bitfold.quantize(source, tmp_path / "out", bits=4, method="rtn", executor="ray:127.0.0.1:1")
