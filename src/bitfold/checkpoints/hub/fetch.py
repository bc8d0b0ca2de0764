"""Fetch models from the Hugging Face Hub, through `huggingface_hub`.

`huggingface_hub` does the transfers, the cache and the login. This module adds what a program needs around them: one
rule for "is this a path or a repository", only the files that bitfold reads (weights once, in one format), bounded
patience with a server that is busy or down, and errors that say what to do. One behaviour of the library is not passed
on: it answers a failing server with whatever an older download left in the cache.
"""

from __future__ import annotations

import difflib
import glob
import re
import warnings
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from bitfold.checkpoints.gguf.parts import part_names
from bitfold.checkpoints.hub.client import endpoint, has_token, open_client
from bitfold.checkpoints.hub.completeness import read_json, require_complete
from bitfold.checkpoints.hub.errors import NotFound, Patience, Unreachable, patiently
from bitfold.checkpoints.object_storage import fetch, is_url
from bitfold.checkpoints.side_files import PICKLES, is_weights, module_folders, side_files
from bitfold.checkpoints.weight_files import INDEX, SINGLE
from bitfold.errors import CheckpointError, HubError, UsageError

# Never fetched: code, which nobody runs; pickles by any name; pictures and films of the card, which can be large.
_NOT_FETCHED = (
    *(".py", ".ipynb", ".sh", ".so", ".dll", ".zip", ".tar", ".gz", ".parquet"),
    *(suffix for suffix in PICKLES if suffix != ".bin"),
    *(".png", ".jpg", ".jpeg", ".gif", ".webp", ".svg", ".pdf", ".mp4", ".webm", ".mov", ".wav", ".mp3", ".flac"),
)
_NAME = r"[A-Za-z0-9][\w.-]*"
_REPO_ID = re.compile(rf"{_NAME}(/{_NAME})?")
_GGUF_IN_REPO = re.compile(rf"(?P<repo>{_NAME}/{_NAME})[:/](?P<file>[^:\\]+\.gguf)")
_FILE_SUFFIXES = (".safetensors", ".json", ".gguf", ".toml", ".txt", *PICKLES)


@dataclass(frozen=True)
class RepoName:
    """A repository on the Hub and, for GGUF, the one file in it that is meant."""

    repo_id: str
    file: str | None = None


def resolve(
    model: str | Path, *, revision: str | None = None, token: str | None = None, cache_dir: str | Path | None = None
) -> Path:
    """The local folder (or GGUF file) of a model, downloaded first if `model` names a repository.

    An existing path wins over a repository of the same name. From a repository come config, tokenizer, model card and
    the safetensors weights, never Python code or pickled weights; a GGUF file comes when it is named, as
    `org/name:file.gguf` or `org/name/file.gguf`, and with it all parts of its model. Files already in the cache are not
    fetched again, and a connection that drops inside a file is resumed where it broke.

    Args:
        model: a folder, a file, a repository (`org/name`, `name`), or a place in object storage (`s3://bucket/folder`),
            see `object_storage.fetch`.
        revision: branch, tag or commit; only with a repository.
        token: access token; by default the usual places are searched (`HF_TOKEN`, `hf auth login`).
        cache_dir: where downloads are kept; by default the cache of `huggingface_hub`.

    Raises:
        CheckpointError: `model` is neither an existing path nor the name of a repository.
        HubError: the Hub refused, failed, or could not be reached and nothing usable is in the cache.
        UsageError: a revision was given with a local path.
    """
    path = Path(model).expanduser()
    if str(model) and path.exists():
        if revision is not None:
            raise UsageError("a revision makes sense only for a repository on the Hub", where=str(model))
        return path
    if is_url(model):
        if revision is not None:
            raise UsageError("a revision makes sense only for a repository on the Hub", where=str(model))
        return fetch(str(model), None if cache_dir is None else Path(cache_dir))
    if isinstance(model, Path):
        raise CheckpointError("no such file or folder", where=str(model), hint="pass a str to name a Hub repository")
    if not model.strip():
        raise UsageError("no model is named", hint="a folder, or a repository of the Hub: org/name")
    try:
        return _Fetch(parse_repo(model), revision, token, None if cache_dir is None else str(cache_dir)).run()
    except (NotFound, Unreachable) as error:
        raise _nowhere(path, error) from error


def _nowhere(path: Path, error: NotFound | Unreachable) -> HubError:
    """The same error for somebody who may have meant a folder."""
    what = error.what if isinstance(error, NotFound) else f"no such folder here, and {error.what}"
    return type(error)(what, where=error.where, hint=f"{_meant(path)}{error.hint}")


def _meant(path: Path) -> str:
    """The beginning of a hint: what is there under a name much like this one; empty if nothing is."""
    try:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=1, cutoff=0.75)
    except OSError:  # there is no such folder to look into
        return ""
    return f"did you mean {path.parent / near[0]}? else " if near else ""


def parse_repo(model: str) -> RepoName:
    """Read `org/name`, `name`, `org/name:file.gguf` or `org/name/file.gguf`.

    Raises:
        CheckpointError: the text can only be a path (and resolve() has seen that the path does not exist).
    """
    if match := _GGUF_IN_REPO.fullmatch(model):
        return RepoName(match["repo"], match["file"])
    if _REPO_ID.fullmatch(model) and not model.endswith(_FILE_SUFFIXES) and ".." not in model:
        return RepoName(model)
    meant = _meant(Path(model).expanduser()) or "check the path; "
    raise CheckpointError(
        "no such file or folder, and not the name of a Hub repository either",
        where=model,
        hint=f"{meant}repositories are written org/name, a GGUF file in one org/name:file.gguf",
    )


@dataclass(frozen=True)
class _Fetch:
    """One download: what, with whose rights, to where."""

    name: RepoName
    revision: str | None
    token: str | None
    cache_dir: str | None

    def run(self) -> Path:
        from huggingface_hub import constants

        if constants.HF_HUB_OFFLINE:
            return self._cached("HF_HUB_OFFLINE is set")
        try:
            return self._download()
        except Unreachable as error:
            try:
                folder = self._cached("the Hub cannot be reached")
            except HubError:
                raise error from None
            warnings.warn(f"{self.where}: {error.what}; using the copy fetched earlier, {folder}", stacklevel=4)
            return folder

    @property
    def where(self) -> str:
        return f"{self.name.repo_id}@{self.revision}" if self.revision else self.name.repo_id

    @property
    def patience(self) -> Patience:
        return Patience(self.where, has_token=has_token(self.token))

    def _download(self) -> Path:
        api = open_client(self.token)
        info = patiently(lambda: api.model_info(self.name.repo_id, revision=self.revision, timeout=30), self.patience)
        files = [sibling.rfilename for sibling in info.siblings or []]
        if self.name.file is not None:
            _require_gguf(files, self.name.file, self.where)
            return self._snapshot(part_names(self.name.file), self.revision) / self.name.file
        require_safetensors(files, self.where)
        # By name, so that the cache remembers which commit the name meant; everything after it by commit.
        folder = self._snapshot(["config.json", INDEX], self.revision)
        if folder.name != info.sha:
            # The library falls back on an older download when the listing fails.
            what = "the Hub stopped answering, and the cache has only an older commit"
            raise HubError(what, where=self.where, hint="run the command again")
        modules = self._modules(files, info.sha)
        wanted = [*files_beside(files, modules), "config.json", *weight_files(folder, files)]
        folder = self._snapshot(wanted, info.sha)
        require_complete(folder, where=self.where)
        return folder

    def _modules(self, files: list[str], revision: str | None) -> list[str]:
        """The folders of a sentence-transformers model, whose weights belong to it."""
        if "modules.json" not in files:
            return []
        file = self._snapshot(["modules.json"], revision) / "modules.json"
        return module_folders(file.read_text(encoding="utf-8", errors="replace"))

    def _snapshot(self, names: list[str], revision: str | None, *, local: bool = False) -> Path:
        from huggingface_hub import snapshot_download

        def fetch() -> Path:
            return Path(
                snapshot_download(
                    self.name.repo_id,
                    revision=revision,
                    token=self.token,
                    cache_dir=self.cache_dir,
                    endpoint=endpoint(),
                    allow_patterns=[glob.escape(name) for name in names],
                    local_files_only=local,
                    library_name="bitfold",
                )
            )

        return fetch() if local else patiently(fetch, self.patience)

    def _cached(self, why: str) -> Path:
        """The copy that an earlier download left, if it is whole."""
        hint = "fetch it once with a connection, or name a local folder"
        try:
            folder = self._snapshot([self.name.file or "config.json"], self.revision, local=True)
            if self.name.file is None:
                require_complete(folder, where=self.where)
                return folder
        except (OSError, CheckpointError) as error:
            raise HubError(f"{why} and no complete copy is in the cache", where=self.where, hint=hint) from error
        if not (folder / self.name.file).is_file():
            raise HubError(f"{why} and {self.name.file} is not in the cache", where=self.where, hint=hint)
        return folder / self.name.file


def fetch_small(repo_id: str, place: Path, revision: str | None, token: str | None) -> tuple[str, list[str]]:
    """Everything of a repository but its weights, into a folder.

    Returns:
        The commit, and the names of the files of weights that belong to it.
    """
    from huggingface_hub import snapshot_download

    patience = Patience(repo_id, has_token=has_token(token))
    info = patiently(lambda: open_client(token).model_info(repo_id, revision=revision, timeout=30), patience)
    files = [sibling.rfilename for sibling in info.siblings or []]
    require_safetensors(files, repo_id)
    beside = [name for name in files_beside(files, []) if not is_weights(PurePosixPath(name).name)]
    small = ["config.json", *([INDEX] if INDEX in files else []), *beside]

    def fetch() -> str:
        return str(
            snapshot_download(
                repo_id,
                revision=info.sha,
                token=token,
                local_dir=place,
                endpoint=endpoint(),
                allow_patterns=[glob.escape(name) for name in small],
                library_name="bitfold",
            )
        )

    patiently(fetch, patience)
    return str(info.sha), [name for name in weight_files(place, files) if name.endswith(".safetensors")]


def _require_gguf(files: list[str], wanted: str, where: str) -> None:
    if wanted in files:
        return
    there = ", ".join(f for f in files if f.endswith(".gguf")) or "none"
    raise HubError(f"the repository has no file {wanted}", where=where, hint=f"its GGUF files: {there}")


def require_safetensors(files: list[str], where: str) -> None:
    """Raise HubError, before anything large is fetched, unless `files` has config.json and safetensors weights."""
    ggufs = [f for f in files if f.endswith(".gguf")]
    if "config.json" in files and any(f.endswith(".safetensors") and "/" not in f for f in files):
        return
    if ggufs:
        raise HubError(
            "the repository holds GGUF files, and which one is meant is not said",
            where=where,
            hint=f"name it: {where.split('@')[0]}:{ggufs[0]}; there are: {', '.join(ggufs)}",
        )
    if any(f.endswith(PICKLES) for f in files):
        raise HubError(
            "the repository has only pickled PyTorch weights, which can run code when they are read",
            where=where,
            hint="look for a converted revision (often refs/pr/N), or convert it where you trust it: "
            "AutoModel.from_pretrained(...).save_pretrained(OUT), which writes safetensors",
        )
    if "adapter_config.json" in files:
        hint = "merge it into its base model first (merge_and_unload of PEFT)"
        raise HubError("the repository holds an adapter, not a model", where=where, hint=hint)
    missing = "safetensors weights" if "config.json" in files else "config.json"
    raise HubError(f"the repository has no {missing}", where=where, hint="is it a Transformers model?")


def files_beside(files: list[str], modules: list[str]) -> list[str]:
    """What is fetched beside weights and config: all that belongs to the model."""
    model = [f for f in side_files(files, modules) if not f.lower().endswith(_NOT_FETCHED)]
    model = [f for f in model if not f.endswith(".bin") or not is_weights(PurePosixPath(f).name)]
    return [*model, *(f for f in files if f == "README.md")]


def weight_files(folder: Path, files: list[str]) -> list[str]:
    """The weight files to fetch, those that `locate` will take: one file, those of the index, or all at the root."""
    if SINGLE in files:
        return [SINGLE]
    if INDEX in files:
        return [INDEX, *sorted(set(read_json(folder / INDEX)["weight_map"].values()))]
    return [f for f in files if f.endswith(".safetensors") and "/" not in f and not f.startswith("adapter_")]
