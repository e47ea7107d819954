"""Endpoints that speak OpenAI's API; the only file that imports its client."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

KEY = "OPENAI_API_KEY"
RETRIES = 5


def client(url: str) -> Any:
    """OpenAI's client for the endpoint at `url`, a context manager; the key is in the environment's `OPENAI_API_KEY`.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import openai
    except ImportError as error:
        raise ValueError(f"{url} needs OpenAI's client ({error}); pip install 'nb_lightning[openai]'") from error
    return openai.OpenAI(base_url=url, api_key=os.environ.get(KEY, "none"), max_retries=RETRIES)


@contextmanager
def asking(url: str) -> Iterator[None]:
    """What goes wrong inside is one `ValueError` with the address."""
    import openai

    try:
        yield
    except (openai.OpenAIError, IndexError, AttributeError, TypeError) as error:  # or an answer of another form
        raise ValueError(f"{url}: {type(error).__name__}: {str(error).strip() or 'no answer'}") from error
