"""How a text begins: the tokens before its first word, decided here for calibration, evaluation and generation."""

from __future__ import annotations

from typing import Any

_PROBE = "a text"


def text_ends(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Token ids that the tokenizer puts before and behind a text: what it does counts, not which tokens it names.

    Llama has `<s>` before, BERT `[CLS]` and `[SEP]` around, GLM two tokens before; GPT-2 names a token for it and puts
    nothing.
    """
    whole, alone = (list(tokenizer(_PROBE, add_special_tokens=special)["input_ids"]) for special in (True, False))
    if whole == alone:  # nothing, or a tokenizer that always puts it
        special = set(getattr(tokenizer, "all_special_ids", ()))
        before = next((i for i, token in enumerate(whole) if token not in special), 0)
        return tuple(whole[:before]), ()
    places = range(len(whole) - len(alone) + 1)
    at = next((i for i in places if whole[i : i + len(alone)] == alone), 0)
    return tuple(whole[:at]), tuple(whole[at + len(alone) :])


def text_start(tokenizer: Any, wanted: bool = True) -> tuple[int, ...]:
    """What windows of a causal model begin with: the ids that the tokenizer puts before a text; () if not wanted.

    What it puts behind a text is for its end, and a window is not one.
    """
    return text_ends(tokenizer)[0] if wanted else ()


def start_name(start: tuple[int, ...], tokenizer: Any) -> str | None:
    """How reports call what windows begin with, such as "<bos>"; None for nothing."""
    return "".join(map(str, tokenizer.convert_ids_to_tokens(list(start)))) if start else None
