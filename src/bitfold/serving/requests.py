"""Requests of OpenAI's interface: which fields there are, and what they may hold.

A field that is not known is refused, as OpenAI does it; those that change nothing here (`user`, `metadata` ...) are
read over. Fields of our own (`top_k`, `min_p`, `typical_p`, `repetition_penalty`) are those of other servers, too.
"""

from __future__ import annotations

import json
import secrets
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bitfold.engine.grammar import JSON_SCHEMA, Grammar
from bitfold.engine.sampling import Sampling
from bitfold.serving.errors import ApiError

_COMPLETION_TOKENS = 16  # where a completion does not say: OpenAI's default
_KINDS = ("str", "int")  # alternatives, of which pydantic names each
_ANY_OBJECT = '{"type": "object"}'


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Strict):
    """What a stream ends with."""

    include_usage: bool = False
    include_obfuscation: bool | None = None  # there is none


class JsonSchema(_Strict):
    """A schema by name."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | bool | None = Field(default=None, alias="schema")
    strict: bool | None = None  # it always is


class ResponseFormat(_Strict):
    """What an answer must be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def grammar(self) -> Grammar | None:
        """Of the answer; UsageError for what is none."""
        if self.type == "text":
            return None
        if self.type == "json_object":
            return Grammar(JSON_SCHEMA, _ANY_OBJECT)
        if self.json_schema is None or self.json_schema.schema_ is None:
            raise ApiError(400, "a json_schema needs a schema", param="response_format", code="invalid_value")
        return Grammar(JSON_SCHEMA, json.dumps(self.json_schema.schema_))


class Request(_Strict):
    """What both kinds have in common."""

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | Annotated[list[str], Field(max_length=64)] | None = None
    seed: int | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, float] | None = None
    top_k: int | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    # These change nothing.
    user: str | None = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None

    def sampling(self, limit: int) -> Sampling:
        """Of a text of at most so many tokens.

        Raises:
            UsageError, ApiError: a value that makes no sense.
        """
        if self.n not in (None, 1):
            raise ApiError(400, "only one answer at a time (n=1)", param="n", code="unsupported_value")
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options are for streams", param="stream_options", code="invalid_value")
        try:
            bias = {int(token): value for token, value in (self.logit_bias or {}).items()}
        except ValueError as error:
            raise ApiError(
                400, "tokens are named by their numbers", param="logit_bias", code="invalid_value"
            ) from error
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return Sampling(
            max_new_tokens=limit,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=secrets.randbits(63) if self.seed is None else self.seed,
            top_k=max(0, self.top_k or 0),  # elsewhere -1 means all
            min_p=self.min_p,
            typical_p=self.typical_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=bias,
            stop=stops,
            grammar=self.grammar(),
        )

    def grammar(self) -> Grammar | None:
        """Of the text."""
        return None

    @property
    def usage_wanted(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage


class TextPart(_Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(_Strict):
    """Of a conversation; what a client gets as an answer it may send back."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: Any = None
    audio: Any = None
    function_call: Any = None
    annotations: Any = None

    def to_dict(self) -> dict[str, Any]:
        """As chat templates know it: text in one piece, arguments of tools as objects."""
        content = self.content if not isinstance(self.content, list) else "".join(part.text for part in self.content)
        role = "system" if self.role == "developer" else self.role
        more = {"name": self.name, "tool_call_id": self.tool_call_id, "reasoning_content": self.reasoning_content}
        calls = None if self.tool_calls is None else [_with_object(call) for call in self.tool_calls]
        found = {**more, "tool_calls": calls}
        return {"role": role, "content": content or "", **{k: v for k, v in found.items() if v is not None}}


def _with_object(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        return {**call, "function": {**function, "arguments": json.loads(function["arguments"])}}
    except (ValueError, RecursionError):
        return call  # as the model wrote it


class ChatRequest(Request):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: Any = None
    verbosity: Any = None

    @property
    def wanted_tokens(self) -> int | None:
        """At most."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def chances(self) -> int | None:
        """As `Asked.chances`."""
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs want logprobs", param="top_logprobs", code="invalid_value")
        return (self.top_logprobs or 0) if self.logprobs else None

    def grammar(self) -> Grammar | None:
        return None if self.response_format is None else self.response_format.grammar()


class CompletionRequest(Request):
    """POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None

    @property
    def wanted_tokens(self) -> int:
        """At most."""
        return _COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def chances(self) -> int | None:
        """As `Asked.chances`."""
        return self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        """One or several, each of which has an answer of its own."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)  # type: ignore[arg-type]


NAMES = frozenset({*ChatRequest.model_fields, *CompletionRequest.model_fields})


def read(kind: type[ChatRequest] | type[CompletionRequest], body: bytes) -> Any:
    """A request out of what was sent.

    Raises:
        ApiError: no JSON, an unknown field, a value of the wrong kind.
    """
    try:
        data = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from error
    if not isinstance(data, dict):
        raise ApiError(400, "the body is not a JSON object", code="invalid_json")
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise _in_words(error) from error


def _in_words(error: ValidationError) -> ApiError:
    """The first of its complaints, unknown fields before all others."""
    found = sorted(error.errors(include_url=False, include_context=False), key=lambda e: e["type"] != "extra_forbidden")
    first = found[0]
    path = ".".join(str(part) for part in first["loc"] if part not in _KINDS and "[" not in str(part))
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"Unrecognized request argument supplied: {path}", param=path, code="unknown_parameter")
    if first["type"] == "missing":
        message = f"you must provide {path}"
        return ApiError(400, message, param=path, code="missing_required_parameter")
    return ApiError(400, f"{path}: {first['msg']}", param=path, code="invalid_value")
