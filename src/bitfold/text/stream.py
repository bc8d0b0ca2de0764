"""Characters in pieces -> token ids in pieces: the same ids as of the whole text, with little of it in memory.

A tokenizer takes some 300 bytes of memory for each character that it is given at once. So it is given pieces that
overlap, and two pieces are joined at a token within the overlap around which both agree: the same tokens at the same
places of the text. How a text is split at one place does not depend on what lies far from it, so this is the split of
the whole. Only where two pieces agree nowhere (letters without end, counted off by a tokenizer that knows no words) are
they joined at the border. A tokenizer that does not say where its tokens are (none of the fast ones) is given pieces
that end with a line.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import Any

PIECE, OVERLAP = 1 << 16, 1 << 12  # characters
_AGREE = 8  # tokens that both pieces must have in common around the joint
Token = tuple[int, int, int]  # id, start and end in characters


def token_pieces(
    pieces: Iterable[str], tokenizer: Any, *, piece: int = PIECE, overlap: int = OVERLAP
) -> Iterator[list[int]]:
    """Ids of the text alone, without special tokens around it; each list is settled when it comes.

    Args:
        pieces: the text.
        tokenizer: of transformers.
        piece, overlap: characters to tokenize at once, and of it with the next piece.
    """
    blocks = _blocks(_sound(pieces), piece)
    if not getattr(tokenizer, "is_fast", False):
        yield from (_ids(tokenizer, block) for block in _whole_lines(blocks))
        return
    text, left = next(blocks, ""), list[Token]()
    while True:
        more = next(blocks, None)
        tokens = _tokens(tokenizer, text)
        if left and (joint := _joint(left, tokens)) is not None:
            yield [token[0] for token in left[: joint[0]]]
            tokens = tokens[joint[1] :]
        elif left:
            yield [token[0] for token in left]
            tokens = [token for token in tokens if token[1] >= left[-1][2]]
        if more is None:
            yield [token[0] for token in tokens]
            return
        settled = next((i for i, t in enumerate(tokens) if t[1] >= len(text) - overlap), len(tokens))
        yield [token[0] for token in tokens[:settled]]
        begin = tokens[settled][1] if settled < len(tokens) else len(text)
        left = [(token, start - begin, end - begin) for token, start, end in tokens[settled:]]
        text = text[begin:] + more


def _tokens(tokenizer: Any, text: str) -> list[Token]:
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return [(token, *place) for token, place in zip(found["input_ids"], found["offset_mapping"], strict=True)]


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _joint(left: list[Token], right: list[Token]) -> tuple[int, int] | None:
    """How many tokens of the first piece to take, and the number of the first of the second; None: they never agree."""
    places = {token: i for i, token in enumerate(right)}
    common = min(_AGREE, max(1, len(left) // 2))
    for i in range(len(left) - common + 1):
        j = places.get(left[i])
        if j is not None and left[i : i + common] == right[j : j + common]:
            return i + common // 2, j + common // 2
    return None


def _blocks(pieces: Iterable[str], size: int) -> Iterator[str]:
    """The text in blocks of so many characters; the last may be shorter."""
    parts, length = list[str](), 0
    for piece in pieces:
        parts.append(piece)
        length += len(piece)
        if length >= size:
            text = "".join(parts)
            whole = length - length % size
            yield from (text[at : at + size] for at in range(0, whole, size))
            parts, length = [text[whole:]], length - whole
    if length:
        yield "".join(parts)


def _whole_lines(blocks: Iterable[str]) -> Iterator[str]:
    left = ""
    for block in blocks:
        head, end, tail = (left + block).rpartition("\n")
        left = tail
        if head or end:
            yield head + end
    if left:
        yield left


def _sound(pieces: Iterable[str]) -> Iterator[str]:
    """Without lone halves of surrogate pairs: JSON can hold them, but no tokenizer takes them."""
    told = False
    for piece in pieces:
        sound = sound_text(piece)
        if sound is not piece and not told:
            told = True
            warnings.warn(
                "the text holds lone surrogates (\\ud800 to \\udfff), read as the replacement character U+FFFD",
                stacklevel=2,
            )
        yield sound


def sound_text(text: str) -> str:
    """The text itself, or with U+FFFD in place of lone surrogates."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
