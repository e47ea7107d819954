"""Models that say what is expected of them, a command, and an endpoint that answers as it is told."""

from __future__ import annotations

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

from nb_lightning.checkpoints.tokenizer_files import load_tokenizer
from nb_lightning.model.transformer import ModelShape, Transformer


def bigram(follows: dict[str, str]) -> Transformer:
    """A model whose next token depends on the last one alone: one of the characters that may follow, equally often."""
    tokenizer = load_tokenizer("bytes").tokenizer
    model = Transformer(ModelShape(260, 64, 1, 1, 1, 64, 64))
    generator = torch.Generator().manual_seed(0)
    u = torch.nn.functional.normalize(torch.randn(260, 64, generator=generator), dim=1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.fill_(1.0) if p.dim() == 1 else p.zero_()
            if name == "embedding.weight":
                p.copy_(u)
        for before, after in follows.items():
            for token in after or ["<|im_end|>"]:
                id = tokenizer.token_to_id(token) if token.startswith("<|") else tokenizer.encode(token).ids[0]
                model.head.weight[id] += 3 * u[tokenizer.encode(before).ids[0]]
    return model


def command(models: Path, output: Path, *more: str) -> list[str]:
    names = {"tasks": models / "tasks.jsonl", "teacher": models / "teacher", "student": models / "student"}
    words = [word for name, path in names.items() for word in (f"--{name}", str(path))]
    return [*words, "--output", str(output), "--k", "2", "--max-new-tokens", "4", "--seed", "3", *more]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class Endpoint(ThreadingHTTPServer):
    """Answers chats with `self.answer(request)`: a message, or a status."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.answer: Any = None
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.requests.append(request)
                answer = server.answer(request)
                body: dict[str, Any] = {"error": {"message": "no"}}
                if isinstance(answer, dict):
                    choice = {"index": 0, "finish_reason": answer.pop("finish", "stop"), "message": answer}
                    body = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
                self.send_response(200 if isinstance(answer, dict) else answer)
                self.send_header("Content-Type", "application/json")
                self.end_headers()
                self.wfile.write(json.dumps(body).encode())

            def log_message(self, *_: Any) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
