"""Variables of the chat template: the server's, and those of a request, which win."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi import HTTPException

from nb_lightning.checkpoints.tokenizer_files import load_tokenizer
from nb_lightning.serve.protocol import ChatRequest
from nb_lightning.serve.routes import OpenAI, ServedModel
from nb_lightning.text.chat_tokens import ChatTokenizer
from tests.harness import ROOT

ASK: list[dict[str, Any]] = [{"role": "user", "content": "1+1?"}]
OPEN, CLOSED = "<think>\n", "<think>\n\n</think>\n\n"


def routes(**variables: Any) -> OpenAI:
    tokenizer = load_tokenizer("bytes")
    family = (ROOT / "tests/text/templates/nanbeige42.jinja").read_text("utf-8")
    chat = ChatTokenizer.of(tokenizer, family).with_variables(variables)
    return OpenAI(ServedModel("tiny", tokenizer, chat, chat.end_ids, 260, 4096, {}, 8, reasoning=True))


@pytest.mark.parametrize(
    "served, asked, end",
    [
        ({}, {}, OPEN),
        ({}, {"enable_thinking": False}, CLOSED),
        ({"enable_thinking": False}, {}, CLOSED),
        ({"enable_thinking": False}, {"enable_thinking": True}, OPEN),
    ],
)  # fmt: skip
def test_a_request_wins_over_the_server(served: dict[str, Any], asked: dict[str, Any], end: str) -> None:
    """A reply begins inside a thought only where the prompt opens one."""
    openai = routes(**served)
    body = ChatRequest.model_validate({"model": "tiny", "messages": ASK, "chat_template_kwargs": asked or None})
    ids, is_reasoning = openai._render(body.messages, None, body.chat_template_kwargs or {})
    text = openai.served.tokenizer.decode(ids)
    assert text.endswith(f"<|im_start|>assistant\n{end}") and is_reasoning == (end == OPEN)


def test_a_reserved_name_is_a_bad_request() -> None:
    with pytest.raises(HTTPException) as refused:
        routes()._render(ASK, None, {"messages": []})
    assert refused.value.status_code == 400
    assert "chat_template_kwargs sets messages" in str(refused.value.detail)
