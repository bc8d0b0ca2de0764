"""Where a finished folder is sent: a repository of the Hub, or object storage."""

from __future__ import annotations

from pathlib import Path

from bitfold.checkpoints import object_storage


def check_place(place: str, token: str | None = None) -> None:
    """Whether a folder can be sent there, as far as that is known before the work.

    Raises:
        HubError: not logged in, or the Hub cannot be reached.
        CheckpointError: the storage does not answer, or has a model there.
    """
    from bitfold.checkpoints.hub.upload import check_login

    if object_storage.is_url(place):
        object_storage.check_empty(place)
    else:
        check_login(token)


def publish(folder: Path, place: str, token: str | None = None) -> str:
    """Send a complete folder; returns its address. Raises as `hub.upload.upload` and `object_storage.send` do."""
    from bitfold.checkpoints.hub.upload import upload

    return object_storage.send(folder, place) if object_storage.is_url(place) else upload(folder, place, token=token)
