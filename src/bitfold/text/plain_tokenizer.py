"""A tokenizer for texts that are written and read one at a time, without what transformers imports for it.

It is the tokenizers library's own object and offers of transformers' interface what generation asks for. Chat templates
go through transformers' renderer, which is imported with the first of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")  # those that take tokenizer.json as it is
_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Entries of tokenizer_config.json with which transformers changes what tokenizer.json says.
_CHANGES = (
    *("add_bos_token", "add_eos_token", "added_tokens_decoder", "additional_special_tokens", "auto_map"),
    *("add_prefix_space", "extra_special_tokens", "split_special_tokens", "post_processor", "fix_mistral_regex"),
)
_REPAIRED = ("mistral", "ministral", "mixtral", "voxtral", "pixtral")  # models of whose rules transformers mends one


class PlainTokenizer:
    """Text to tokens and back.

    Args:
        backend: a `tokenizers.Tokenizer`.
        roles: bos_token, eos_token ... -> the token; what chat templates may ask for.
        chat_template: Jinja's source; None where there is none.
        whole: makes transformers' tokenizer of the same checkpoint, for those that want one.
    """

    def __init__(self, backend: Any, roles: Mapping[str, str], chat_template: Any, whole: Callable[[], Any]) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend, self._roles, self.chat_template, self.whole = backend, dict(roles), chat_template, whole

    def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> dict[str, list[Any]]:
        """{"input_ids": tokens of the text, "offset_mapping": where each begins and ends in it}; warns of nothing.

        Args:
            text: any.
            add_special_tokens: with the tokens that begin and end a text.
        """
        found = self._backend.encode(text, add_special_tokens=add_special_tokens)
        return {"input_ids": found.ids, "offset_mapping": found.offsets}

    def __len__(self) -> int:
        """How many tokens there are."""
        return int(self._backend.get_vocab_size())

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """The text of tokens."""
        return str(self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def convert_ids_to_tokens(self, ids: int | Sequence[int]) -> Any:
        """The name of a token, or of each of several; None for one that it does not have."""
        if isinstance(ids, int):
            return self._backend.id_to_token(ids)
        return [self._backend.id_to_token(int(i)) for i in ids]

    @property
    def eos_token_id(self) -> int | None:
        """The token that ends a text."""
        token = self._roles.get("eos_token")
        found: int | None = None if token is None else self._backend.token_to_id(token)
        return found

    @property
    def all_special_ids(self) -> list[int]:
        """Tokens that play a role."""
        return [self._backend.token_to_id(token) for token in dict.fromkeys(self._roles.values())]

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = False,
        tokenize: bool = True,
        return_tensors: str | None = None,
        return_dict: bool = True,
        **more: Any,
    ) -> Any:
        """A conversation written out: its text, or {"input_ids": its tokens}; as transformers' method of that name."""
        if isinstance(self.chat_template, list):  # several, by name: rare enough
            made = self.whole().apply_chat_template(
                conversation, tools=tools, add_generation_prompt=add_generation_prompt, tokenize=False, **more
            )
        else:
            import transformers.utils.chat_template_utils as templates

            render: Any = templates.render_jinja_template
            texts, _ = render(
                conversations=[conversation],
                chat_template=self.chat_template,
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                **{**self._roles, **more},
            )
            made = texts[0]
        if not tokenize:
            return made
        ids: Any = self(made, add_special_tokens=False)["input_ids"]
        ids = torch.tensor([ids], dtype=torch.int64) if return_tensors == "pt" else ids
        return {"input_ids": ids} if return_dict else ids


def read_plain(folder: Path, whole: Callable[[], Any]) -> PlainTokenizer | None:
    """The tokenizer of a folder, if transformers would take its tokenizer.json as it is.

    None where its class or its settings do more than that, or where it cannot be read: transformers has the words for
    it.

    Args:
        folder: where its files are.
        whole: see `PlainTokenizer`.
    """
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        model = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if config.get("tokenizer_class") not in _CLASSES or any(key in config for key in _CHANGES):
            return None
        if str(model.get("model_type")).startswith(_REPAIRED):
            return None
        from tokenizers import Tokenizer

        backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
        template, roles = _template(folder, config), _roles(config)
    except Exception:  # of files that are missing or damaged in whatever way
        return None
    if roles is None or template is _UNKNOWN or not set(roles.values()) <= _added(backend):
        return None
    return PlainTokenizer(backend, roles, template, whole)


_UNKNOWN = object()


def _added(backend: Any) -> set[str]:
    return {token.content for token in backend.get_added_tokens_decoder().values()}


def _roles(config: Mapping[str, Any]) -> dict[str, str] | None:
    """None where a role is not given as plain text."""
    found = {role: config[role] for role in _ROLES if config.get(role) is not None}
    return found if all(isinstance(token, str) for token in found.values()) else None


def _template(folder: Path, config: Mapping[str, Any]) -> Any:
    """The chat template as transformers looks for it: a file before the entry, `_UNKNOWN` for several of them."""
    if (folder / "additional_chat_templates").is_dir() or (folder / "chat_template.json").is_file():
        return _UNKNOWN
    file = folder / "chat_template.jinja"
    return file.read_text(encoding="utf-8") if file.is_file() else config.get("chat_template")
