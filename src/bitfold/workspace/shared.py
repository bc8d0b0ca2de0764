"""The workspace of a run of several processes: the first one keeps the journal, the others know what it says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from bitfold.checkpoints.staging import open_output, partial_of
from bitfold.errors import UsageError
from bitfold.system.outputs import real_path
from bitfold.system.team import Team
from bitfold.workspace.folder import Workspace, kept_after_failure

_REFUSED = "the first process has said why it does not begin"


class Notes(Protocol):
    """Of a journal, what a run writes and reads."""

    def append(self, record: Mapping[str, Any]) -> None:
        """Note a finished piece of work."""
        ...

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """All records of a kind, oldest first."""
        ...

    def sync(self) -> None:
        """Wait until it is on the disk."""
        ...


class Work(Protocol):
    """Of a workspace, what a run of one process or of several uses."""

    result: Path
    state: Path

    @property
    def journal(self) -> Notes:
        """What is finished."""
        ...


class _Heard:
    """The journal, in a process that does not keep it: every process appends the same records to its own."""

    def __init__(self, records: list[dict[str, Any]]) -> None:
        self.records = records

    def append(self, record: Mapping[str, Any]) -> None:
        """See `Notes`."""
        self.records.append(dict(record))

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """See `Notes`."""
        return [record for record in self.records if record["kind"] == kind]

    def sync(self) -> None:
        """The process that keeps it waits."""


class _Follower:
    """The workspace, in a process that does not lead."""

    def __init__(self, folder: Path, records: list[dict[str, Any]]) -> None:
        self.result, self.state, self.journal = folder / "result", folder / "state", _Heard(records)


def shared_output(out: str | Path, source: Path, team: Team) -> Path:
    """The real path of an output, which the leader alone tries: two at once would find each other's attempts there.

    Args:
        out: as the user wrote it.
        source: what is read; nothing may be written into it.
        team: the processes.

    Raises:
        UsageError: not a path; or the first process has refused it.
        CheckpointError: of the first process: see `open_output`.
    """
    if team.rank > 0:
        if not team.told(None):
            raise UsageError(_REFUSED, where=str(out))
        return real_path(out)
    good = False
    try:
        place = open_output(out, source)
        good = True
    finally:
        team.told(good)
    return place


@contextmanager
def shared_work(place: Path, identity: Mapping[str, Any], team: Team, *, restart: bool) -> Iterator[Work]:
    """The workspace of a run; after a failure, what is finished stays for the next time. Who leads publishes it.

    Args:
        place: the folder to be made, which all processes see.
        identity: what decides its bytes.
        team: the processes.
        restart: forget what an earlier run left.

    Raises:
        UsageError: it is finished already; or a process does not see the folder.
        CheckpointError: it exists, or another run's work is there.
    """
    if team.rank > 0:
        records = team.told(None)
        if records is None:
            raise UsageError(_REFUSED, where=str(place))
        follower = _Follower(partial_of(place), records)
        _require_sight(follower.state, team)
        yield follower
        return
    work, told = None, False
    try:
        work = Workspace(place, identity, restart=restart)
        if work.published is not None:
            work.journal.discard()
            raise UsageError("is finished already", where=str(place))
        told = True
        team.told(work.journal.records)
    finally:
        if not told:
            team.told(None)
    with kept_after_failure(work):
        _require_sight(work.state, team)
        yield work


def _require_sight(state: Path, team: Team) -> None:
    blind = [rank for rank, sees in enumerate(team.collected(state.is_dir())) if not sees]
    if blind:
        what = f"process {blind[0]} does not see the folder of the first"
        raise UsageError(what, where=str(state), hint="write to storage that all machines share")
