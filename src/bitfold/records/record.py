"""What is known about a quantized folder, kept inside it (of a GGUF file, beside it): how it was made, and what was
measured since.

`bitfold_report.json` has a part for each kind of knowledge; `bitfold compare` and `bitfold report` read it, so that
they need neither the original nor any time. Nothing depends on it: a folder without it loads and runs the same.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bitfold.errors import CheckpointError
from bitfold.records.run_report import PACKED_ALREADY, QuantizeReport, TensorReport
from bitfold.system.outputs import try_folder
from bitfold.text.mixes import without_folders
from bitfold.version import __version__

FILE = "bitfold_report.json"
_MEASURED = ("evaluations", "layers", "samples", "outliers")
_SAME = ("reference", "metric", "text", "start_token", "context", "tokens", "dtype")  # one evaluation is kept for each


def environment() -> dict[str, str]:
    """Versions and machine, for reports."""
    import transformers

    return {
        "bitfold": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "threads": str(torch.get_num_threads()),
    }


def read_record(folder: str | Path) -> dict[str, Any]:
    """The record of a folder; empty when it has none.

    Raises:
        CheckpointError: the file is damaged.
    """
    file = _file_of(Path(folder))
    if not file.is_file():
        return {}
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"not readable JSON: {error}", where=str(file), hint="delete the file") from error
    if not isinstance(record, dict):
        raise CheckpointError("not a record of bitfold", where=str(file), hint="delete the file")
    return record


def _file_of(model: Path) -> Path:
    """In a folder; beside a GGUF file."""
    return model.with_name(f"{model.name}.{FILE}") if model.is_file() else model / FILE


def write_record(folder: Path, report: QuantizeReport, facts: Mapping[str, Any]) -> None:
    """Begin the record of a folder: the run that made it. Paths of this machine stay out of it.

    Args:
        folder: the folder.
        report: of the run.
        facts: seeds and settings.
    """
    if (calibration := facts.get("calibration")) is not None:
        facts = {**facts, "calibration": {**calibration, "text": without_folders(calibration["text"])}}
    run = {**report.to_dict(), "source": Path(report.source).name, "output": None, **facts}
    _write(folder, {"quantize": run, "environment": environment()})


def with_earlier_errors(source: Path, tensors: Sequence[TensorReport]) -> list[TensorReport]:
    """The same, and of tensors that were packed in the source already the errors that its record has.

    Args:
        source: of the run.
        tensors: what it reports.

    Raises:
        CheckpointError: the record of the source is damaged.
    """
    if all(t.reason != PACKED_ALREADY for t in tensors):
        return list(tensors)
    earlier = [TensorReport.from_known(t) for t in read_record(source).get("quantize", {}).get("tensors", [])]
    known = {t.tensor: t for t in earlier}

    def complete(t: TensorReport) -> TensorReport:
        was = known.get(t.tensor) if t.reason == PACKED_ALREADY else None
        return t if was is None else replace(t, error=was.error, output_error=was.output_error, flags=was.flags)

    return [complete(t) for t in tensors]


def carry_record(source: Path, folder: Path, parts: Mapping[str, Any]) -> None:
    """Begin the record of a folder that was made out of another one of ours: how that was made, and what came after.

    What was measured of the other is left behind.
    """
    known = {key: value for key, value in read_record(source).items() if key not in _MEASURED}
    _write(folder, {**known, **parts, "environment": environment()})


def check_record(folder: str | Path) -> None:
    """To be asked before anything is measured that `add_to_record` shall keep.

    Raises:
        CheckpointError: no local folder of a model, or it cannot be written into.
    """
    path = Path(folder)
    if not path.is_file() and not (path / "config.json").is_file():
        raise CheckpointError("no model folder on this machine to keep the numbers in", where=str(folder))
    try_folder(path.parent if path.is_file() else path)  # of a GGUF file, beside it


def add_to_record(folder: str | Path, part: str, value: Mapping[str, Any]) -> None:
    """Put something measured into the record of a folder.

    Args:
        folder: a local folder.
        part: "evaluations" (kept for each setting), "layers", "samples", "outliers" (the last one is kept).
        value: JSON-able.
    """
    folder = Path(folder)
    check_record(folder)
    record = read_record(folder)
    if part == "evaluations":
        others = [e for e in record.get(part, []) if any(e.get(key) != value.get(key) for key in _SAME)]
        record[part] = [*others, dict(value)]
    else:
        record[part] = dict(value)
    record.setdefault("environment", environment())
    _write(folder, record)


def _write(folder: Path, record: Mapping[str, Any]) -> None:
    file = _file_of(folder)
    partial = file.with_name(file.name + ".partial")
    try:
        partial.write_text(json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
        partial.replace(file)
    except OSError as error:
        raise CheckpointError(f"cannot be written: {error}", where=str(file)) from error
