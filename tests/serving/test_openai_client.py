"""The official client is content: chats, completions, streams, errors."""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import tiny_lm
from bitfold.engine import Sampling, Writer
from serving.fakes import until

openai = pytest.importorskip("openai", reason="the openai client is not installed")

MESSAGES: Any = [{"role": "user", "content": "Line 1"}]
MODEL = "tiny"


@pytest.fixture
def client(server: Any) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)


def ours(prompt: str, sampling: Sampling, chat: bool = False) -> str:
    writer = Writer(tiny_lm.model(), tiny_lm.tokenizer())
    return (writer.say if chat else writer.write)(prompt, sampling).text


def test_models(client):
    (model,) = client.models.list().data
    assert model.id == MODEL
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError) as refused:
        client.models.retrieve("gpt-5")
    assert refused.value.code == "model_not_found"


def test_a_chat_says_what_the_library_says(client):
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=0, max_completion_tokens=20)
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == ours("Line 1", Sampling(20), chat=True)
    assert choice.finish_reason == "length"
    assert answer.usage.completion_tokens == 20
    assert answer.usage.total_tokens == 20 + answer.usage.prompt_tokens
    assert answer.object == "chat.completion"


def test_a_stream_is_the_same(client):
    settings: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "temperature": 0, "max_tokens": 20}
    whole = client.chat.completions.create(**settings)
    chunks = list(client.chat.completions.create(**settings, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 20
    assert len({c.id for c in chunks}) == 1
    assert all(c.usage is None for c in client.chat.completions.create(**settings, stream=True))


def test_completions(client):
    settings: dict[str, Any] = {"model": MODEL, "prompt": "Line 1", "temperature": 0, "max_tokens": 12}
    answer = client.completions.create(**settings)
    assert answer.choices[0].text == ours("Line 1", Sampling(12))
    assert "".join(c.choices[0].text for c in client.completions.create(**settings, stream=True)) == ours(
        "Line 1", Sampling(12)
    )
    assert client.completions.create(model=MODEL, prompt="a").usage.completion_tokens <= 16
    ids = tiny_lm.tokenizer()("Line 1")["input_ids"]
    assert client.completions.create(**{**settings, "prompt": ids}).choices[0].text == answer.choices[0].text


def test_several_prompts(client):
    prompts = ["Line 1", "Line 2", "the", "a", "b"]
    settings: dict[str, Any] = {"model": MODEL, "prompt": prompts, "temperature": 0, "max_tokens": 8}
    answer = client.completions.create(**settings)
    expected = [ours(prompt, Sampling(8)) for prompt in prompts]
    assert [choice.text for choice in answer.choices] == expected
    found = [""] * 5
    for chunk in client.completions.create(**settings, stream=True):
        found[chunk.choices[0].index] += chunk.choices[0].text
    assert found == expected


def test_seeds(client):
    def draw(**settings: Any) -> str:
        settings = {"model": MODEL, "messages": MESSAGES, "max_tokens": 20, "temperature": 1.0, **settings}
        return str(client.chat.completions.create(**settings).choices[0].message.content)

    assert draw(seed=7) == draw(seed=7) != draw(seed=8)
    assert draw() != draw()


def test_stops(client):
    settings: dict[str, Any] = {"model": MODEL, "prompt": "Line 1", "temperature": 0, "max_tokens": 30}
    text = client.completions.create(**settings).choices[0].text
    stop = text[9:11]
    for given in (stop, ["never there", stop]):
        answer = client.completions.create(**settings, stop=given)
        assert answer.choices[0].text == text[: text.index(stop)]
        assert answer.choices[0].finish_reason == "stop"


def test_penalties_and_biases(client):
    settings: dict[str, Any] = {"model": MODEL, "prompt": "Line 1", "temperature": 0, "max_tokens": 10}
    assert client.completions.create(**settings, logit_bias={"64": 100}).choices[0].text == "a" * 10
    plain = client.completions.create(**settings).choices[0].text
    for name in ("presence_penalty", "frequency_penalty"):
        biased = client.completions.create(**settings, logit_bias={"64": 8.0}, **{name: 2.0}).choices[0].text
        assert biased == ours("Line 1", Sampling(10, logit_bias={64: 8.0}, **{name: 2.0}))
    longer = {**settings, "max_tokens": 60, "extra_body": {"repetition_penalty": 5.0}}
    penalized = client.completions.create(**longer).choices[0].text
    assert penalized == ours("Line 1", Sampling(60, repetition_penalty=5.0)) != ours("Line 1", Sampling(60))
    one = client.completions.create(**{**settings, "temperature": 2.0}, extra_body={"top_k": 1})
    assert one.choices[0].text == plain


def test_logprobs(client):
    """Of the model's own logits, with the likeliest beside them."""
    settings: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_tokens": 5}
    chat = client.chat.completions.create(**settings, messages=MESSAGES, logprobs=True, top_logprobs=3)
    found = chat.choices[0].logprobs.content
    tokenizer = tiny_lm.tokenizer()
    ids = list(tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=True)["input_ids"])
    with torch.no_grad():
        for chance in found:
            logprobs = tiny_lm.model()(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(0)
            values, places = logprobs.topk(3)
            assert math.isclose(chance.logprob, float(values[0]), abs_tol=0.02)
            assert [top.logprob for top in chance.top_logprobs] == pytest.approx(values.tolist(), abs=0.02)
            ids.append(int(places[0]))
    raw = bytes(byte for chance in found for byte in chance.bytes)
    assert raw.decode(errors="replace") == chat.choices[0].message.content
    completion = client.completions.create(**settings, prompt="Line 1", logprobs=2)
    old = completion.choices[0].logprobs
    assert len(old.tokens) == len(old.token_logprobs) == len(old.top_logprobs) == len(old.text_offset) == 5
    streamed = list(client.chat.completions.create(**settings, messages=MESSAGES, logprobs=True, stream=True))
    parts = [c.choices[0].logprobs.content for c in streamed if c.choices[0].logprobs]
    assert sum(map(len, parts)) == 5


def test_response_formats(client):
    pytest.importorskip("llguidance", reason="llguidance is not installed")
    settings: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "max_tokens": 90}
    schema = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 1, "maximum": 9}}, "required": ["n"]}
    wanted: Any = {
        "type": "json_schema",
        "json_schema": {"name": "n", "schema": {**schema, "additionalProperties": False}},
    }
    for seed in range(3):
        answer = client.chat.completions.create(**settings, response_format=wanted, seed=seed)
        assert 1 <= json.loads(answer.choices[0].message.content)["n"] <= 9
        assert answer.choices[0].finish_reason == "stop"
    answer = client.chat.completions.create(**settings, response_format={"type": "json_object"}, seed=1)
    assert answer.choices[0].message.content.startswith("{")
    bad: Any = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "nonsense"}}}
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**settings, response_format=bad)
    assert "JSON schema" in str(refused.value)


def test_conversations_as_clients_send_them(client):
    """Parts of text, answers with all their fields, tools and their results."""
    first = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=3)
    messages: Any = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi "}, {"type": "text", "text": "you"}]},
        first.choices[0].message.model_dump(),
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}],
        },
        {"role": "tool", "tool_call_id": "1", "content": "7"},
    ]
    tools: Any = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    answer = client.chat.completions.create(model=MODEL, messages=messages, tools=tools, max_tokens=3, user="me")
    assert answer.usage.completion_tokens <= 3
    assert answer.usage.prompt_tokens > 30


def test_fifty_clients_at_once(client, server):
    """None is lost, each has its own text."""

    def ask(i: int) -> str:
        settings: dict[str, Any] = {"model": MODEL, "prompt": f"Line {i % 7}", "temperature": 0, "max_tokens": 5 + i}
        if i % 2:
            return "".join(chunk.choices[0].text for chunk in client.completions.create(**settings, stream=True))
        return str(client.completions.create(**settings).choices[0].text)

    expected = [ours(f"Line {i % 7}", Sampling(5 + i)) for i in range(50)]
    with ThreadPoolExecutor(50) as pool:
        assert list(pool.map(ask, range(50))) == expected
    until(server.service.scheduler.idle)
