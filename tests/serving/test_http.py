"""What may go wrong between a client and the server, and what the server says of itself."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from serving.fakes import FakeDecoder, until

httpx = pytest.importorskip("httpx", reason="httpx is not installed")

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
GOOD: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}


def refused(response: Any, status: int, code: str | None = None) -> dict[str, Any]:
    """Checks the form of an error."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert code is None or error["code"] == code
    return dict(error)


def post(server: Any, path: str = CHAT, headers: dict[str, str] | None = None, **body: Any) -> Any:
    return httpx.post(server.url + path, json=body, headers=headers, timeout=60)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"temprature": 1}, "temprature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"n": 2}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": [{"role": "king", "content": "Hi"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, None),
        ({"stop": [""]}, "stop"),
        ({"stop": 5}, "stop"),
        ({"seed": 2**80}, "seed"),
        ({"min_p": 7.0}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"chat_template_kwargs": {"tokenize": False}}, "chat_template_kwargs"),
        ({"presence_penalty": 3}, "presence_penalty"),
    ],
    ids=str,
)
def test_fields_that_make_no_sense(server, change, param):
    error = refused(post(server, **{**GOOD, **change}), 400)
    assert error["type"] == "invalid_request_error"
    if param is not None:
        assert error["param"] == param


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b'"text"', b"\xff\xfe", b"[" * 100000, b'{"a":' * 50000, b"1" * 10000],
    ids=lambda body: str(body[:10]),
)
def test_what_is_no_request(server, body):
    refused(httpx.post(server.url + CHAT, content=body), 400, "invalid_json")


def test_missing_fields(server):
    assert refused(post(server, model="tiny"), 400, "missing_required_parameter")["param"] == "messages"
    assert refused(post(server, COMPLETIONS, model="tiny"), 400)["param"] == "prompt"
    refused(post(server, COMPLETIONS, model="tiny", prompt=""), 400)
    refused(post(server, COMPLETIONS, model="tiny", prompt=[]), 400)
    refused(post(server, COMPLETIONS, model="tiny", prompt=[99999]), 400)
    refused(post(server, COMPLETIONS, model="tiny", prompt=[-1]), 400)
    refused(post(server, COMPLETIONS, model="tiny", prompt="a", echo=True), 400)


def test_long_prompts(server):
    long = {**GOOD, "messages": [{"role": "user", "content": "x" * 500}]}
    error = refused(post(server, **long), 400, "context_length_exceeded")
    assert "maximum context length is 120 tokens" in error["message"]
    refused(post(server, COMPLETIONS, model="tiny", prompt="x" * 500), 400, "context_length_exceeded")
    refused(post(server, **{**GOOD, "messages": [{"role": "user", "content": "x" * 2**21}]}), 413)
    cut = post(server, **{**GOOD, "max_tokens": 100000}).json()
    assert cut["choices"][0]["finish_reason"] in ("length", "stop")
    assert cut["usage"]["total_tokens"] <= 120


def test_places(server):
    refused(post(server, **{**GOOD, "model": "gpt-5"}), 404, "model_not_found")
    refused(httpx.get(server.url + "/v1/nothing"), 404)
    refused(httpx.get(server.url + CHAT), 405)
    assert httpx.get(server.url + "/health").json() == {"status": "ok"}


def test_keys(serve):
    server = serve(context=120, sequences=1, key="sesame")
    for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer sesam\u00e9".encode()}):
        refused(httpx.post(server.url + CHAT, json=GOOD, headers=header), 401, "invalid_api_key")
        refused(httpx.get(server.url + "/v1/models", headers=header), 401, "invalid_api_key")
    right = {"Authorization": "Bearer sesame"}
    assert post(server, headers=right, **GOOD).status_code == 200
    assert httpx.get(server.url + "/v1/models", headers=right).status_code == 200
    assert httpx.get(server.url + "/health").status_code == 200


def test_web_pages(server, serve):
    """A page on another host must not use what listens here, unless it is named."""
    refused(post(server, headers={"Origin": "https://evil.example"}, **GOOD), 403, "origin_not_allowed")
    named = serve(context=120, sequences=1, origins=("https://chat.example",))
    refused(post(named, headers={"Origin": "https://evil.example"}, **GOOD), 403)
    answer = post(named, headers={"Origin": "https://chat.example"}, **GOOD)
    assert answer.headers["access-control-allow-origin"] == "https://chat.example"
    asked = {"Origin": "https://chat.example", "Access-Control-Request-Method": "POST"}
    assert httpx.options(named.url + CHAT, headers=asked).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_place(serve, stream):
    decoder = FakeDecoder(1, positions=10**6, following=lambda text: time.sleep(0.005) or 70)  # type: ignore[func-returns-value]
    server = serve(decoder, context=120, sequences=1)
    server.service.preparer._context = 10**6
    with httpx.Client() as client:
        body = {"model": "tiny", "prompt": "a", "max_tokens": 10**5, "stream": stream}
        if stream:
            with client.stream("POST", server.url + COMPLETIONS, json=body) as response:
                lines = response.iter_lines()
                assert "ggg" in "".join(
                    json.loads(next(lines)[6:])["choices"][0]["text"] + next(lines) for _ in range(5)
                )
                assert not server.service.scheduler.idle()
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post(server.url + COMPLETIONS, json=body, timeout=0.5)
    until(server.service.scheduler.idle)
    assert post(server, COMPLETIONS, model="tiny", prompt="a", max_tokens=3).json()["choices"][0]["text"] == "ggg"


def test_a_full_queue(serve):
    decoder = FakeDecoder(1)
    decoder.gate.clear()
    server = serve(decoder, context=120, sequences=1, queue=1)
    with httpx.Client(timeout=60) as client:
        waiting = [
            client.send(client.build_request("POST", server.url + CHAT, json={**GOOD, "stream": True}), stream=True)
            for _ in range(2)
        ]
        answer = post(server, **GOOD)
        refused(answer, 429, "rate_limit_exceeded")
        assert answer.headers["retry-after"]
        decoder.gate.set()
        assert all("[DONE]" in response.read().decode() for response in waiting)


def test_a_failure_in_a_stream(serve, caplog):
    decoder = FakeDecoder(1)
    server = serve(decoder, context=120, sequences=1)
    decoder.broken = RuntimeError("secret path")
    lines = post(server, **GOOD, stream=True).text.strip().split("\n\n")
    error = json.loads(lines[-1].removeprefix("data: "))["error"]
    assert error["type"] == "server_error"
    assert "secret" not in error["message"]
    assert "secret path" in caplog.text  # but whoever runs the server sees it
    decoder.broken = RuntimeError("again")
    refused(post(server, **GOOD), 500)
    assert post(server, **GOOD).status_code == 200


def test_metrics(serve):
    parser = pytest.importorskip("prometheus_client.parser", reason="prometheus_client is not installed")
    server = serve(context=120, sequences=2)

    def figures() -> dict[str, float]:
        text = httpx.get(server.url + "/metrics").text
        families = list(parser.text_string_to_metric_families(text))
        assert all(family.documentation for family in families)
        return {
            sample.name + "".join(sorted(sample.labels.values())): sample.value
            for family in families
            for sample in family.samples
        }

    before = figures()
    answers = [post(server, **{**GOOD, "temperature": 0}).json() for _ in range(2)]
    post(server, **{**GOOD, "n": 2})
    after = figures()
    assert after["bitfold_generated_tokens_total"] - before["bitfold_generated_tokens_total"] == sum(
        answer["usage"]["completion_tokens"] for answer in answers
    )
    assert after["bitfold_prompt_tokens_total"] == sum(answer["usage"]["prompt_tokens"] for answer in answers)
    assert after["bitfold_reused_tokens_total"] == answers[0]["usage"]["prompt_tokens"] - 1
    assert answers[1]["usage"]["prompt_tokens_details"]["cached_tokens"] == answers[0]["usage"]["prompt_tokens"] - 1
    assert after["bitfold_texts_totalfinished"] == 2
    assert after[f"bitfold_requests_total{CHAT}200"] == 2 or after[f"bitfold_requests_total200{CHAT}"] == 2
    assert after["bitfold_first_token_seconds_count"] == 2
    assert after["bitfold_texts_running"] == after["bitfold_texts_waiting"] == 0
