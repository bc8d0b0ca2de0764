"""How long a text a model takes, whatever its config calls that."""

from __future__ import annotations

from typing import Any

# What configs call it, in the order in which they are believed.
_NAMES = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_sequence_length",
    "max_target_positions",
    "n_ctx",
)
# Families whose positions begin behind the padding token's.
_PADDED = ("roberta", "xlm-roberta", "camembert", "roberta-prelayernorm", "data2vec-text", "xlm-roberta-xl")


def positions(config: Any) -> int | None:
    """Tokens that a model has positions for; None = any number, or its config does not say.

    Args:
        config: transformers' config of it, or of something that contains it (pictures and text).
    """
    text = config.get_text_config()
    for name in _NAMES:
        limit = getattr(text, name, None)
        if isinstance(limit, int) and limit > 0:
            return limit - 1 - int(text.pad_token_id or 0) if text.model_type in _PADDED else limit
    return None
