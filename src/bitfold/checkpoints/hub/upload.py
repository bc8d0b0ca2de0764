"""Publish folders on the Hugging Face Hub: whole checkpoints only, by somebody who is logged in."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bitfold.checkpoints.hub.client import has_token, open_client
from bitfold.checkpoints.hub.completeness import require_complete
from bitfold.checkpoints.hub.errors import Patience, patiently
from bitfold.checkpoints.weight_files import INDEX
from bitfold.errors import HubError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

NOT_UPLOADED = [".*", "*/.*", "*.tmp", "*.partial", "*.incomplete", "__pycache__/*"]


def check_login(token: str | None = None) -> str:
    """The user that the token belongs to; call it before hours of work whose result is to be uploaded.

    Raises:
        HubError: no token, an expired or invalid one, or the Hub cannot be reached.
    """
    if not has_token(token):
        raise HubError("not logged in", hint="run `hf auth login`, or set HF_TOKEN")
    api = open_client(token)
    return str(patiently(lambda: api.whoami(), Patience("the Hub", has_token=True))["name"])


def upload(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str | None = None,
) -> str:
    """Publish a checkpoint folder as a repository, created if need be; returns its address.

    `HfApi.upload_folder` serves small and large folders alike: with `hf_xet` (a dependency of `huggingface_hub`) it
    streams, and running it again after an interruption sends only what is missing; `upload_large_folder`, which older
    versions had for that, takes no commit message and is gone. Weight files of an earlier upload that the folder no
    longer has are deleted from the branch (its history keeps them): two sets of weights beside one config are a trap.

    Args:
        folder: a complete checkpoint: config.json, every shard whole.
        repo_id: `org/name`, or `name` in the user's own namespace.
        private: make the repository private; refused if it already exists and is public.
        revision: the branch to upload to, created from `main` if need be.
        token, commit_message: as in `huggingface_hub`.

    Raises:
        CheckpointError: the folder is not a complete checkpoint; nothing was sent.
        HubError: not logged in, no right to write, or the Hub failed.
    """
    folder = Path(folder)
    require_complete(folder)
    patience = Patience(repo_id, has_token=has_token(token), writing=True)
    if not patience.has_token:
        raise HubError("uploading needs a login", where=repo_id, hint="run `hf auth login`, or set HF_TOKEN")
    api = open_client(token)
    url = patiently(lambda: api.create_repo(repo_id, private=private or None, exist_ok=True), patience)
    full_id = url.repo_id
    if private and not patiently(lambda: api.model_info(full_id), patience).private:
        raise HubError(
            "the repository exists and is public", where=full_id, hint="choose another name or make it private first"
        )
    if revision is not None and revision != "main":
        patiently(lambda: api.create_branch(full_id, branch=revision, exist_ok=True), patience)
    patiently(lambda: _send(api, folder, full_id, revision, commit_message), patience)
    return str(url) if revision is None else f"{url}/tree/{revision}"


def open_repo(repo_id: str, token: str | None) -> str:
    """Make a repository if need be; its address. See `upload` for the errors."""
    api, patience = open_client(token), Patience(repo_id, has_token=has_token(token), writing=True)
    return str(patiently(lambda: api.create_repo(repo_id, exist_ok=True), patience))


def send_file(file: Path, repo_id: str, token: str | None) -> None:
    """One file of weights. See `upload` for the errors."""
    api, patience = open_client(token), Patience(repo_id, has_token=has_token(token), writing=True)
    message = f"Upload {file.name} with bitfold"
    patiently(
        lambda: api.upload_file(path_or_fileobj=file, path_in_repo=file.name, repo_id=repo_id, commit_message=message),
        patience,
    )


def send_rest(folder: Path, repo_id: str, token: str | None, weights: list[str]) -> str:
    """What makes files of weights that were sent one by one a checkpoint; others of an earlier upload are deleted.

    Returns:
        The address of the repository.
    """
    api, patience = open_client(token), Patience(repo_id, has_token=has_token(token), writing=True)
    there = patiently(lambda: api.list_repo_files(repo_id), patience)
    stale = [name for name in there if name.endswith(".safetensors") and "/" not in name and name not in weights]
    patiently(
        lambda: api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message="Upload quantized model with bitfold",
            ignore_patterns=[*NOT_UPLOADED, "*.safetensors"],
            delete_patterns=[*stale, *([INDEX] if not (folder / INDEX).is_file() else [])] or None,
        ),
        patience,
    )
    return open_repo(repo_id, token)


def _send(api: HfApi, folder: Path, repo_id: str, revision: str | None, message: str | None) -> None:
    api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        revision=revision,
        commit_message=message or "Upload quantized model with bitfold",
        ignore_patterns=list(NOT_UPLOADED),
        delete_patterns=["model*.safetensors", INDEX],
    )
