"""The events of a run as JSON lines, for programs: one object a line, each with `event` and `time`.

`begin` and `resume`, then one `tensor` for each tensor and one `block` for each calibrated block, and `end` or `error`.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from bitfold.errors import BitfoldError, CheckpointError
from bitfold.system.outputs import real_path


class Events:
    """Writes events; without a file, nowhere.

    Args:
        path: the file; None = no events. An existing file is continued.

    Raises:
        CheckpointError: the file cannot be opened.
    """

    def __init__(self, path: Path | None) -> None:
        self._file: IO[str] | None = None
        if path is not None:
            try:
                self._file = real_path(path).open("a", encoding="utf-8")
            except OSError as error:
                raise CheckpointError(f"cannot be opened: {error}", where=str(path)) from error

    def write(self, event: str, **facts: Any) -> None:
        """One line. A disk that is full loses events, never the run."""
        if self._file is None:
            return
        text = json.dumps({"event": event, "time": round(time.time(), 3), **facts}, ensure_ascii=False)
        try:
            self._file.write(text + "\n")
            self._file.flush()
        except OSError:
            self._file = None

    def __enter__(self) -> Events:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            what = error.what if isinstance(error, BitfoldError) else f"{type(error).__name__}: {error}"
            where = error.where if isinstance(error, BitfoldError) else None
            self.write("error", what=what, where=where)
        if self._file is not None:
            self._file.close()
