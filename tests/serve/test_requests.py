"""Bad requests: an error in OpenAI's shape, and a server that goes on."""

from __future__ import annotations

import json
import random
import re
import urllib.error
from pathlib import Path
from typing import Any

import openai
import pytest

from nb_lightning.serve.__main__ import arguments as arguments_of
from nb_lightning.serve.__main__ import default_sampling, serve
from tests.serve.harness import CHAT, CONTEXT, PLACE, REPLIES, ROWS, TOOLS, Running, ask

pytestmark = pytest.mark.runs

BAD: list[tuple[dict[str, Any], str]] = [
    ({"model": 1}, "model: "),
    ({"messages": []}, "messages: "),
    ({"messages": "x"}, "messages: "),
    ({"messages": [{"role": "king", "content": "x"}]}, "unknown role 'king'"),
    ({"messages": [{"role": "user"}]}, "message 0: no content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "type text only"),
    ({"messages": [{"role": "user", "content": "raise"}]}, "not this"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "not UTF-8"),
    ({"temperature": -1}, "temperature: "),
    ({"temperature": "hot"}, "temperature: "),
    ({"temperature": float("nan")}, "temperature: "),
    ({"top_p": 0}, "top_p: "),
    ({"top_p": 1.1}, "top_p: "),
    ({"max_tokens": 0}, "max_tokens: "),
    ({"max_tokens": 1.5}, "max_tokens: "),
    ({"max_tokens": CONTEXT}, "context is 100000 tokens"),
    ({"messages": [{"role": "user", "content": "x" * CONTEXT}]}, "context is 100000 tokens"),
    ({"n": 0}, "n: "),
    ({"n": ROWS + 1}, f"this server takes {ROWS}"),
    ({"stop": ["a"] * 5}, "stop"),
    ({"stop": ""}, "stop"),
    ({"seed": 2**70}, "seed: "),
    ({"stream": "yes"}, "stream: "),
    ({"logprobs": 2}, "logprobs: "),
    ({"top_logprobs": 2}, "top_logprobs needs logprobs"),
    ({"logit_bias": {"1": 2}}, "logit_bias is not supported"),
    ({"presence_penalty": 1}, "presence_penalty is not supported"),
    ({"tools": [{"type": "function"}]}, "tool 0 is not"),
    ({"tool_choice": "required"}, "tool_choice: "),
    ({"grammar": "x"}, "grammar: "),
    ({"chat_template_kwargs": 3}, "chat_template_kwargs: "),
    ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs sets tools"),
]  # fmt: skip


@pytest.mark.parametrize("change, says", BAD, ids=[f"{i}-{'-'.join(change)}" for i, (change, _) in enumerate(BAD)])
def test_a_bad_request_is_an_error_in_openais_shape(server: Running, change: dict[str, Any], says: str) -> None:
    status, answer = server.request("/v1/chat/completions", json.dumps({**CHAT, **change}).encode())
    assert status == 400 and says in answer["error"]["message"], answer
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert answer["error"]["type"] == "invalid_request_error"


def test_openais_client_raises_its_classes_of_errors(server: Running) -> None:
    with pytest.raises(openai.NotFoundError, match="no model 'gpt'; this server has 'tiny'") as unknown:
        server.client.completions.create(model="gpt", prompt="x")
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError, match="99999 of completion") as long:
        ask(server, max_tokens=99_999)
    assert long.value.code == "context_length_exceeded"
    for bad in ([], [[]], ["x", 1], [260], [-1], {}):
        with pytest.raises(openai.BadRequestError, match="prompt"):
            server.client.completions.create(model="tiny", prompt=bad)


def test_malformed_http_bodies_are_refused(server: Running) -> None:
    chat = "/v1/chat/completions"
    for body in (b"", b"{", b"null", b"[]", b"\xff", b'"x"', b"[" * 100_000, b'{"seed": ' + b"9" * 5000 + b"}"):
        status, answer = server.request(chat, body)
        assert status == 400 and answer["error"]["message"], body[:20]
    assert server.request(chat, json.dumps(CHAT).encode(), "text/plain")[0] == 400
    assert server.request(chat)[0] == 405
    assert server.request("/v1/engines")[0] == 404
    assert server.request("/v1/models/%ff%00")[0] == 404
    huge = json.dumps({**CHAT, "user": "x" * (9 * 2**20)}).encode()
    try:
        status, answer = server.request(chat, huge)
        assert status == 413 and answer["error"]["message"] == "Payload too large"
    except urllib.error.URLError:  # it does not read to the end what it does not want
        pass
    assert ask(server, temperature=0).choices[0].message.content == REPLIES[PLACE]


def test_a_template_that_hangs_is_ended(server: Running) -> None:
    with pytest.raises(openai.BadRequestError, match="the template takes longer"):
        ask(server, "hang")
    assert ask(server, temperature=0).choices[0].message.content == REPLIES[PLACE]


def test_spoilt_requests_never_break_the_server(server: Running) -> None:
    """Bodies that are wrong somewhere: an answer below 500 to each, and a server that goes on."""
    rng = random.Random(0)
    full: dict[str, Any] = {
        **CHAT, "n": 2, "seed": 1, "stop": ["x"], "stream": False, "temperature": 1.0, "top_p": 0.5, "logprobs": True,
        "top_logprobs": 1, "tools": TOOLS, "tool_choice": "auto", "stream_options": {"include_usage": True},
    }  # fmt: skip
    values = [
        None, True, False, 0, -1, 1, 2**31, 2**63, -(2**80), 0.5, -0.0, 1e308, float("inf"), float("nan"), "", "x",
        "\ud800", "\x00", "é" * 300, [], [None], [[]], [1], ["x"] * 4, {}, {"role": "user"}, {"x": {"y": [1]}}, "tiny",
        [{"role": "user", "content": "x", "tool_calls": [1]}], [{"role": "assistant", "tool_calls": [{"function": 1}]}],
    ]  # fmt: skip

    def spoil(value: Any) -> Any:
        if isinstance(value, dict) and value and rng.random() < 0.8:
            key = rng.choice(list(value))
            out = {**value, key: spoil(value[key])}
            if rng.random() < 0.2:
                out[rng.choice(["echo", "best_of", "x\ud800", "prompt", "logit_bias", "response_format"])] = rng.choice(
                    values
                )
            return out
        if isinstance(value, list) and value and rng.random() < 0.8:
            at = rng.randrange(len(value))
            return [*value[:at], spoil(value[at]), *value[at + 1 :]]
        return rng.choice(values)

    seen = set()
    for _ in range(300):
        chat = rng.random() < 0.7
        base = (
            full
            if chat
            else {k: v for k, v in full.items() if k in ("model", "max_tokens", "n", "stop")} | {"prompt": "x"}
        )
        body = json.dumps(spoil(base)).encode()
        if rng.random() < 0.1:
            at = rng.randrange(len(body))
            body = body[:at] + rng.randbytes(3) + body[at:]
        try:
            status, answer = server.request("/v1/chat/completions" if chat else "/v1/completions", body)
        except json.JSONDecodeError:  # a stream
            status, answer = 200, {}
        assert status < 500, (body, answer)
        assert status == 200 or answer["error"]["message"], body
        seen.add(status)
    assert seen >= {200, 400, 404}
    assert ask(server, temperature=0).choices[0].message.content == REPLIES[PLACE]


def test_default_sampling_is_the_models_else_the_papers(tmp_path: Path) -> None:
    file = tmp_path / "generation_config.json"
    assert default_sampling(tmp_path) == {"temperature": 0.6, "top_p": 0.95}  # the paper's
    for content, how in (
        ('{"eos_token_id": 1}', {"temperature": 0.6, "top_p": 0.95}),
        ('{"temperature": 0.3, "top_k": 5, "top_p": null}', {"temperature": 0.3, "top_k": 5}),
        ('{"do_sample": false, "temperature": 0.3}', {"temperature": 0.0}),
    ):
        file.write_text(content)
        assert default_sampling(tmp_path) == how
    for bad in ('{"temperature": "hot"}', '{"top_p": 2}', "[]", "{"):
        file.write_text(bad)
        with pytest.raises(ValueError, match=r"generation_config\.json"):
            default_sampling(tmp_path)


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--model", "nowhere"], "no checkpoint at 'nowhere'"),
        (["--max-batch", "0"], "--max-batch is 0; it must be at least 1"),
    ],
)
def test_a_bad_argument_is_named(folder: Path, arguments: list[str], says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        serve(arguments_of(["--model", str(folder), *arguments]))
