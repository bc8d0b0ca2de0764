"""The tokenizer of a folder, read in one place, and what is wrong with it in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bitfold.errors import CheckpointError, UsageError
from bitfold.text.plain_tokenizer import read_plain

_WHOLE = "tokenizer.json"
_SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
_PARTS = (*("vocab.json", "vocab.txt", "merges.txt"), *_SENTENCEPIECE)
_PROBE = "a text"


def is_tokenizer(name: str) -> bool:
    """Whether a file of that name holds a vocabulary."""
    return name in (_WHOLE, *_PARTS)


def read_tokenizer(folder: Path, *, name: str | None = None, plain: bool = False) -> Any:
    """The tokenizer of a folder, as transformers reads it; code that lies beside it is never run.

    Args:
        folder: where its files are.
        name: what messages call it; default: the folder.
        plain: a `PlainTokenizer` will do, where it makes the same tokens.

    Raises:
        CheckpointError: there is none, or none that can be read: which file, why, and what to do.
    """
    if plain and (found := read_plain(folder, lambda: read_tokenizer(folder, name=name))) is not None:
        return found
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
        ids = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
    except Exception as error:  # tokenizers raises Exception itself, and transformers whatever it stumbles over
        what, hint = _explain(folder, error)
        raise CheckpointError(what, where=name or str(folder), hint=hint) from error
    if not ids:
        # transformers makes an empty tokenizer of a class whose vocabulary is not there, and every text vanishes in it.
        what = "its tokenizer makes no tokens of a text: the files of its vocabulary are missing"
        raise CheckpointError(what, where=name or str(folder), hint=_COPY)
    return tokenizer


_COPY = "copy the tokenizer files of the original model (tokenizer.json ...) into the folder"


def _explain(folder: Path, error: Exception) -> tuple[str, str]:
    """What is wrong, and what to do."""
    first = (str(error).strip().splitlines() or [""])[0].rstrip(": ") or type(error).__name__
    if "trust_remote_code" in str(error):
        what = "its tokenizer is a class of its own, in code that is not run here"
        return (
            what,
            "save it as tokenizer.json with its own library (save_pretrained of a fast tokenizer), and put it here",
        )
    if not (folder / _WHOLE).is_file():
        have = [name for name in _PARTS if (folder / name).is_file()]
        if not have:
            return "has no tokenizer", _COPY
        if have[0] in _SENTENCEPIECE:
            what = f"its tokenizer is a SentencePiece model alone ({have[0]}), and it cannot be read: {first}"
            return what, "pip install sentencepiece protobuf, or put the tokenizer.json of the model into the folder"
        return f"its tokenizer cannot be read ({', '.join(have)}): {first}", _COPY
    return f"its tokenizer cannot be read ({_WHOLE} and tokenizer_config.json): {first}", f"{_COPY} again"


def require_chat(tokenizer: Any, where: str) -> None:
    """Try the chat template on a message.

    Raises:
        UsageError: there is none.
        CheckpointError: it does not parse, or fails on a message of the user.
    """
    if not getattr(tokenizer, "chat_template", None):
        hint = "it is not a chat model: give it a text to continue instead (bitfold generate)"
        raise UsageError("the model has no chat template", where=where, hint=hint)
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": _PROBE}], tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program: it fails with whatever it stumbles over
        first = (str(error).strip().splitlines() or [""])[0] or type(error).__name__
        hint = "mend chat_template.jinja (or chat_template in tokenizer_config.json), or give a text to continue"
        raise CheckpointError(f"the chat template cannot be used: {first}", where=where, hint=hint) from error
