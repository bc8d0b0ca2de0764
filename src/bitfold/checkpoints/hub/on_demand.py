"""A repository open for reading with little disk: headers first, each file of weights when a tensor of it is asked for.

A file that is not there stands as a file of the same length with its header and nothing else (sparse: it takes no
room), so that everything but the values can be read. At most `KEPT` files are there at a time.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from bitfold.checkpoints.hub.client import endpoint, has_token
from bitfold.checkpoints.hub.errors import Patience, patiently
from bitfold.checkpoints.hub.fetch import fetch_small, parse_repo
from bitfold.checkpoints.safetensors import SafetensorsSource
from bitfold.checkpoints.untrusted import LARGEST
from bitfold.errors import CheckpointError, HubError, UsageError
from bitfold.system import progress
from bitfold.system.units import size_text

KEPT = 2  # a tensor may be made of several, which may lie in two files


class OnDemand(SafetensorsSource):
    """See the module.

    Args:
        repo: `org/name`.
        place: a folder for the files; kept between runs, so that what is there is not fetched again.
        revision: branch, tag or commit; None: main.
        token: access token.

    Raises:
        UsageError: no repository of safetensors.
        HubError: it cannot be fetched.
    """

    def __init__(self, repo: str, place: Path, revision: str | None = None, token: str | None = None) -> None:
        if Path(repo).exists() or (name := parse_repo(repo)).file is not None:
            raise UsageError("only a repository of safetensors is read with little disk", where=repo)
        self._repo, self._token, self._there = name.repo_id, token, list[str]()
        self._patience = Patience(repo, has_token=has_token(token))
        self.path = place
        place.mkdir(parents=True, exist_ok=True)
        self._commit, files = fetch_small(name.repo_id, place, revision, token)
        for file in files:
            self._stand_in(place / file)
        super().__init__(place)

    def read(self, name: str) -> torch.Tensor:
        """See `Source`."""
        self._fetch(self._where[name])
        return super().read(name)

    def read_rows(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """See `Source`."""
        self._fetch(self._where[name])
        return super().read_rows(name, rows)

    def fingerprint(self) -> dict[str, Any]:
        """The repository and its commit."""
        return {"repository": self._repo, "commit": self._commit}

    def by_file(self, names: Iterable[str]) -> int:
        """The place of the last file that some tensors lie in, to order work by."""
        order = {file: i for i, file in enumerate(self.files)}
        return max(order[self._where[name]] for name in names)

    def largest(self) -> int:
        """Bytes of its largest file."""
        return max(file.stat().st_size for file in self.files)

    def close(self) -> None:
        """Let go of the files of weights that are there."""
        for file in self.files:
            if file.name in self._there:
                self._let_go(file)

    def _fetch(self, file: Path) -> None:
        if file.name in self._there:
            return
        from huggingface_hub import hf_hub_download

        while len(self._there) >= KEPT:
            self._let_go(self.path / self._there[0])
        progress.say(f"fetching {file.name} ({size_text(file.stat().st_size)})")
        size = file.stat().st_size
        file.unlink()
        patiently(
            lambda: hf_hub_download(
                self._repo,
                file.name,
                revision=self._commit,
                token=self._token,
                local_dir=self.path,
                endpoint=endpoint(),
                library_name="bitfold",
            ),
            self._patience,
        )
        self._there.append(file.name)
        if file.stat().st_size != size:
            raise CheckpointError(f"has {file.stat().st_size} bytes, {size} were announced", where=str(file))

    def _let_go(self, file: Path) -> None:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            stream.seek(0)
            header = stream.read(8 + length)
        hollow(file, header, file.stat().st_size)
        for left in (self.path / ".cache" / "huggingface" / "download").glob(f"{file.name}*"):
            left.unlink()
        self._there = [name for name in self._there if name != file.name]

    def _stand_in(self, file: Path) -> None:
        """The header of a file, out of its first bytes, and nothing else."""
        if file.is_file():  # of an earlier run, whole or hollow: nobody knows which
            self._let_go(file)
            return
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        where = f"{self._repo}/{file.name}"
        url = hf_hub_url(self._repo, file.name, revision=self._commit, endpoint=endpoint())
        size = patiently(lambda: get_hf_file_metadata(url, token=self._token), self._patience).size or 0
        (length,) = struct.unpack("<Q", self._bytes(url, 8))
        if length > min(LARGEST, size - 8):
            raise CheckpointError("is no safetensors file", where=where)
        hollow(file, self._bytes(url, 8 + length), size)

    def _bytes(self, url: str, count: int) -> bytes:
        """The first bytes of a file. The token goes to the Hub alone, not to where it sends us on."""
        from huggingface_hub import utils

        http: Any = utils

        def ask() -> bytes:
            headers = {**http.build_hf_headers(token=self._token), "Range": f"bytes=0-{count - 1}"}
            answer = http.get_session().get(url, headers=headers, follow_redirects=True, timeout=60)
            http.hf_raise_for_status(answer)
            return bytes(answer.content[:count])

        found = patiently(ask, self._patience)
        if len(found) != count:
            raise HubError(f"gave {len(found)} bytes, {count} were asked for", where=url)
        return found


def hollow(file: Path, header: bytes, size: int) -> None:
    """A file of that length which holds a header and takes no more room than that."""
    aside = file.with_name(f"{file.name}.hollow")
    with aside.open("wb") as stream:
        stream.write(header)
        stream.truncate(size)
    aside.replace(file)
