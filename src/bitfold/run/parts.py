"""Finished tensors between the process that made them and the one that puts them into the output.

A part is a folder, named by a hash of what decides its bytes and of the names of its tensors: the tensors in a file of
safetensors, and `part.json` with their hashes and reports. It is written aside and renamed, so what has its name is
whole; what it says of a tensor is believed only if the hash agrees.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from bitfold.checkpoints.folder import SafetensorsFolder
from bitfold.checkpoints.safetensors import write_json
from bitfold.checkpoints.schema import Entry, stored_name
from bitfold.checkpoints.shards import sync_file, written_error
from bitfold.errors import CheckpointError
from bitfold.planning.decisions import Decision
from bitfold.planning.plan import Plan
from bitfold.run.items import Made, make_item
from bitfold.run.order import Order, planned
from bitfold.system.memory import Ceiling

_FACTS = "part.json"
_ONE = 1 << 62  # bytes of a file: a part has one


def digest(identity: str) -> str:
    """By which parts of a run are known."""
    return hashlib.sha256(identity.encode()).hexdigest()


def part_name(identity: str, tensors: tuple[str, ...]) -> str:
    """Name of the folder of a part."""
    return hashlib.sha256("\n".join((digest(identity), *tensors)).encode()).hexdigest()[:32]


def make_part(order: Order, tensors: tuple[str, ...], folder: str, limit: int | None) -> str:
    """Make tensors of a run and write them as a part; what another process has made already is not made again.

    Args:
        order: the run.
        tensors: their names.
        folder: where parts lie; it is there.
        limit: ceiling on the resident memory of this process, bytes; None = none.

    Returns: the name of the part.

    Raises:
        BitfoldError: it cannot be made, or this process would make other bytes.
    """
    name = part_name(order.identity, tensors)
    if (Path(folder) / name).is_dir():
        return name
    run, wanted, ceiling = planned(order), set(tensors), Ceiling(limit)
    aside = Path(folder) / f".{name}.{platform.node()}.{os.getpid()}"
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        facts = []
        target = SafetensorsFolder(aside, _ONE)
        target.layout({name: c for name, c in run.plan.contents().items() if name in wanted})
        for item in run.plan.items:
            if wanted.isdisjoint(item.decisions):
                continue
            others = {name for name in item.decisions if name not in wanted}
            for made in make_item(run.source, run.model, item, order.seed, others):
                facts.append(_put(target, made))
                del made
                ceiling.check()
        target.sync()
        write_json(aside / _FACTS, {"identity": digest(order.identity), "file": target.files[0], "tensors": facts})
        sync_file(aside / _FACTS)
        _give_name(aside, Path(folder) / name)
    except OSError as error:
        raise written_error(error, aside, "cannot be written") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return name


def _put(target: SafetensorsFolder, made: Made) -> dict[str, Any]:
    name, value = made.decision.tensor, made.value
    hashes = target.pack(name, value) if isinstance(value, Mapping) else target.write(name, value)
    return {"tensor": name, "hashes": hashes, "facts": made.facts()}


def _give_name(aside: Path, path: Path) -> None:
    """A twin that was faster has made the same bytes."""
    try:
        aside.rename(path)
    except OSError:
        if not path.is_dir():
            raise


def parts_in(folder: Path, identity: str) -> list[str]:
    """Names of the parts of a run; what is of another one, or was cut off, is removed."""
    found = []
    for path in sorted(folder.iterdir()):
        try:
            ours = json.loads((path / _FACTS).read_text(encoding="utf-8"))["identity"] == digest(identity)
        except (OSError, ValueError, KeyError):
            ours = False
        if ours and not path.name.startswith("."):
            found.append(path.name)
        else:
            shutil.rmtree(path, ignore_errors=True)
    return found


def read_part(path: Path, plan: Plan) -> Iterator[Made]:
    """What a part holds, tensor by tensor.

    Raises:
        CheckpointError: its bytes are not those that were written.
    """
    decisions = {d.tensor: d for d in plan.decisions}
    try:
        facts = json.loads((path / _FACTS).read_text(encoding="utf-8"))
        with safe_open(path / facts["file"], "pt") as file:
            for record in facts["tensors"]:
                yield _made(decisions[record["tensor"]], record, file)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise _damaged(path) from error


def _made(decision: Decision, record: Mapping[str, Any], file: Any) -> Made:
    stored = {name: file.get_tensor(name) for name in record["hashes"]}
    for name, value in stored.items():
        if _sha(value) != record["hashes"][name]:
            raise ValueError(name)
    content = decision.content()
    facts = {"error": record["facts"]["error"], "flags": list(record["facts"]["flags"])}
    if not isinstance(content, Entry):
        return Made(decision, [stored[decision.tensor]], **facts)
    prefix = len(stored_name(decision.tensor, ""))
    return Made(decision, {name[prefix:]: value for name, value in stored.items()}, **facts)


def _sha(value: torch.Tensor) -> str:
    raw: Any = value.contiguous().reshape(-1).view(torch.uint8).numpy() if value.numel() else b""
    return hashlib.sha256(memoryview(raw)).hexdigest()


def _damaged(path: Path) -> CheckpointError:
    hint = "the same command makes it again"
    return CheckpointError("a finished part is not as it was written", where=str(path), hint=hint)
