"""Connect to endpoints that speak OpenAI's API; the only file that imports its client."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

API_KEY = "OPENAI_API_KEY"  # the environment variable
RETRIES = 5


def connect(url: str) -> Any:
    """Build OpenAI's client for the endpoint at `url`, a context manager. The environment may hold the API key.

    Raises:
        ValueError: the client is not installed.
    """
    try:
        import openai
    except ImportError as error:
        raise ValueError(f"{url} needs OpenAI's client ({error}); pip install 'nb_lightning[openai]'") from error
    return openai.OpenAI(base_url=url, api_key=os.environ.get(API_KEY, "none"), max_retries=RETRIES)


@contextmanager
def endpoint_errors(url: str) -> Iterator[None]:
    """Turn any error of a request into one `ValueError` with the address."""
    import openai

    try:
        yield
    except (
        openai.OpenAIError,
        IndexError,
        AttributeError,
        TypeError,
    ) as error:  # or a reply of another form
        raise ValueError(f"{url}: {type(error).__name__}: {str(error).strip() or 'no answer'}") from error
