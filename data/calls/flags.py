"""The flags of every command that calls models, and what they make."""

from __future__ import annotations

import argparse
from urllib.parse import urlsplit

from data.calls.budget import Budget
from data.calls.caller import MAX_FAILED
from data.calls.endpoint import CONCURRENCY, TIMEOUT_S, Endpoint
from data.calls.engine import Engine
from data.calls.local import NO_VARIABLES, LocalModel
from nb_lightning.errors import require_at_least
from nb_lightning.generation.decoder import MAX_BATCH
from nb_lightning.text.variables import Variables


def add_call_flags(parser: argparse.ArgumentParser) -> None:
    """Add the group "calls to models": how endpoints and local models are asked, and at which limits to stop."""
    g = parser.add_argument_group("calls to models")
    g.add_argument("--concurrency", type=int, default=CONCURRENCY, metavar="N", help="calls to an endpoint at a time "
                   "(default: %(default)s)")  # fmt: skip
    g.add_argument("--timeout", type=float, default=TIMEOUT_S, metavar="SECONDS", help="of one attempt at an endpoint "
                   "(default: %(default)s)")  # fmt: skip
    g.add_argument("--max-batch", type=int, default=MAX_BATCH, metavar="N", help="calls to a local model at a time "
                   "(default: %(default)s)")  # fmt: skip
    g.add_argument("--device", default="auto", help="of local models")
    g.add_argument("--dtype", default="auto", help="of local models: auto, float32, bfloat16, float16")
    g.add_argument("--max-failed", type=float, default=MAX_FAILED, metavar="X", help="stop when more than this share "
                   "of the calls got no reply (default: %(default)s)")  # fmt: skip
    g.add_argument("--max-calls", type=int, metavar="N", help="stop after N replies, earlier runs included")
    g.add_argument("--max-tokens", type=int, metavar="N", help="stop after N tokens of prompts and replies")
    g.add_argument("--price", metavar="IN,OUT", help="of a million tokens of prompts and of replies at an endpoint")
    g.add_argument("--budget", type=float, metavar="X", help="stop when the calls have cost X, by --price")


def budget_of(a: argparse.Namespace) -> Budget:
    """Return the budget that the flags say.

    Raises:
        ValueError: names the flag whose value cannot be.
    """
    price = None
    if a.price is not None:
        try:
            price_in, price_out = map(float, a.price.split(","))
        except ValueError:
            raise ValueError(f"--price is {a.price!r}; it must be two numbers: IN,OUT") from None
        price = price_in, price_out
    return Budget(a.max_calls, a.max_tokens, a.budget, price)


def check_call_flags(a: argparse.Namespace) -> None:
    """Check the flags that `budget_of` and `Caller` do not.

    Raises:
        ValueError: names the flag whose value cannot be.
    """
    require_at_least(a, concurrency=1, max_batch=1)
    if not 0 < a.timeout < float("inf"):
        raise ValueError(f"--timeout is {a.timeout:g}; it must be above 0 seconds")


def is_address(text: str) -> bool:
    """Whether `text` is meant as the address of an endpoint, and not as a path."""
    return "://" in text


def parse_engine(text: str, flag: str) -> str:
    """Check what names an engine: the address of an endpoint, or the path of a model on this machine.

    Returns:
        The address without a slash at its end, or the path as it is.

    Raises:
        ValueError: names the flag and what an address looks like.
    """
    if not is_address(text):
        return text
    try:
        url = urlsplit(text)
        is_one_word = text.isprintable() and not any(map(str.isspace, text))
        valid = is_one_word and url.scheme in ("http", "https") and url.hostname and url.port != 0
    except ValueError:
        valid = False
    if not valid:
        raise ValueError(f"{flag} is {text!r}; an endpoint's address is http(s)://HOST[:PORT]/v1")
    if url.username is not None or url.query or url.fragment:
        raise ValueError(f"{flag}: an address has no user, query or fragment; the API key is read from OPENAI_API_KEY")
    return text.rstrip("/")


def make_engine(
    flag: str,
    text: str,
    model: str | None,
    a: argparse.Namespace,
    template: str | None = None,
    variables: Variables = NO_VARIABLES,
) -> Engine:
    """Make the engine that a flag names, such as `--teacher URL|MODEL` with `--teacher-model NAME`.

    Args:
        model: the endpoint's name for the model.
        a: has the flags of `add_call_flags`.
        template, variables: of a local model, see `LocalModel`.

    Raises:
        ValueError: `parse_engine`; or an endpoint without a model's name.
    """
    engine = parse_engine(text, flag)
    if not is_address(engine):
        return LocalModel(engine, template, a.max_batch, a.device, a.dtype, variables)
    if not model:
        raise ValueError(f"{flag} is an endpoint: name its model with {flag}-model")
    return Endpoint(engine, model, a.concurrency, a.timeout)
