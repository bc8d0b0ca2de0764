"""Runs from a repository to a repository on a disk that holds neither: each file of the result leaves when it is full.

A file that was sent stays behind as its header alone, so that what was written can still be held against the plan.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from bitfold.checkpoints.base import Source, Target
from bitfold.checkpoints.headers import read_header
from bitfold.checkpoints.hub.on_demand import KEPT, OnDemand, hollow
from bitfold.checkpoints.hub.upload import open_repo, send_file, send_rest
from bitfold.checkpoints.object_storage import is_url
from bitfold.checkpoints.shards import SHARD_BYTES
from bitfold.errors import UsageError
from bitfold.executors.opening import LOCAL
from bitfold.forecast.preflight import Preflight
from bitfold.planning.plan import Plan
from bitfold.run.options import Request, RunOptions
from bitfold.system import progress
from bitfold.workspace.journal import Journal

WHY = "--low-disk has no whole model to calibrate"
_SENT = "sent"


def check_low_disk(request: Request, options: RunOptions) -> None:
    """UsageError for what cannot be done that way."""
    if options.upload_repo is None:
        raise UsageError("the result has to go somewhere", where="--low-disk", hint="--upload-repo org/name")
    if is_url(options.upload_repo) or is_url(request.source):
        raise UsageError("goes from one repository of the Hub to another", where="--low-disk", hint="or without it")
    if options.executor != LOCAL:
        raise UsageError("files that come and go are for one process", where="--executor", hint="drop --low-disk")
    if request.export is not None:
        raise UsageError("only bitfold's own folders are sent file by file", where="--export", hint="drop --low-disk")


def require_data_free(plan: Plan) -> None:
    """UsageError for a method that needs the model on text."""
    if any(d.scheme.needs_text for d in plan.quantized):
        hint = "--method rtn or hqq, or --bits alone"
        raise UsageError("the method is calibrated on the whole model", where="--low-disk", hint=hint)


@contextmanager
def on_demand(request: Request, options: RunOptions) -> Iterator[OnDemand]:
    """The repository, in a hidden folder beside the output, which is removed when all went well."""
    place = request.out.with_name(f".{request.out.name}.source")
    source = OnDemand(request.source, place, options.revision, options.token)
    try:
        yield source
    finally:
        source.close()
    shutil.rmtree(place, ignore_errors=True)


def on_demand_of(source: Source) -> OnDemand:
    """The source of such a run."""
    assert isinstance(source, OnDemand)
    return source


def by_file(plan: Plan, source: OnDemand) -> Plan:
    """Its tensors in the order in which they lie in the repository's files."""
    return Plan(tuple(sorted(plan.items, key=lambda item: source.by_file(item.target.sources))))


def with_little_disk(found: Preflight, source: OnDemand, max_shard_bytes: int | None) -> Preflight:
    """What such a run needs of the disk: some files of the source, two of the result."""
    result = min(found.output_bytes, 2 * (max_shard_bytes or SHARD_BYTES))
    return replace(found, disk_bytes=KEPT * source.largest() + result)


class Sender:
    """Sends files of weights as they are completed, and remembers which are sent.

    Args:
        repo: where to.
        token: access token.
        target: what is written.
        folder: where its files are.
        journal: of the run.
    """

    def __init__(self, repo: str, token: str | None, target: Target, folder: Path, journal: Journal) -> None:
        self._repo, self._token, self._folder, self._journal, self._target = repo, token, folder, journal, target
        self.sent = {str(record["file"]) for record in journal.of_kind(_SENT)}
        self._left = {file: set(read_header(folder / file)) for file in target.files}
        self._of = {name: file for file, names in self._left.items() for name in names}
        open_repo(repo, token)

    def holds(self, stored: str) -> bool:
        """Whether a stored tensor is in a file that was sent."""
        return self._of[stored] in self.sent

    def wrote(self, stored: Iterable[str]) -> None:
        """Some stored tensors are in their places: send the files that are full now."""
        for name in stored:
            file = self._of[name]
            self._left[file].discard(name)
            if not self._left[file] and file not in self.sent:
                self._send(file)

    def _send(self, file: str) -> None:
        path = self._folder / file
        self._target.sync()
        progress.say(f"sending {file}")
        send_file(path, self._repo, self._token)
        self._journal.append({"kind": _SENT, "file": file})
        self._journal.sync()
        self.sent.add(file)
        with path.open("rb") as stream:
            header = stream.read(path.stat().st_size - sum(info.nbytes for info in read_header(path).values()))
        hollow(path, header, path.stat().st_size)

    def finish(self) -> None:
        """Send all but the weights, which makes the repository a checkpoint, and let the empty files go."""
        send_rest(self._folder, self._repo, self._token, self._target.files)
        for file in self._target.files:
            (self._folder / file).unlink()
