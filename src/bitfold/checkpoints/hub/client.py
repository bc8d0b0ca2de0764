"""The client of `huggingface_hub`, and whether there is a login."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from huggingface_hub import HfApi


def open_client(token: str | None) -> HfApi:
    """With that token, or the one of the usual places."""
    from huggingface_hub import HfApi

    return HfApi(endpoint=endpoint(), token=token, library_name="bitfold")


def endpoint() -> str | None:
    """HF_ENDPOINT as it is now (huggingface_hub reads it only once, when it is imported)."""
    return os.environ.get("HF_ENDPOINT") or None


def has_token(token: str | None) -> bool:
    """Whether there is a token, given or in the usual places."""
    from huggingface_hub import get_token

    return bool(token or get_token())
