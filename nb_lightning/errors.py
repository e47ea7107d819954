"""What a command says to the user in one line: errors that end it, and notes that do not."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class RunStopped(RuntimeError):
    """The run cannot go on. The message says why, what is safe, and how to continue."""


@contextmanager
def one_line_errors(*kinds: type[Exception], interrupted: str | None = None, prefix: str = "error") -> Iterator[None]:
    """Run a command's body; what the user can mend ends the process with one line on stderr and exit status 1.

    Args:
        kinds: further exceptions that count as such; ValueError always does.
        interrupted: how to go on after Ctrl-C, which then ends with one line too; without it, Ctrl-C is not caught.
        prefix: what the line begins with.
    """
    try:
        yield
    except (ValueError, *kinds) as error:
        sys.exit(f"{prefix}: {error}")
    except KeyboardInterrupt:
        if interrupted is None:
            raise
        sys.exit(f"interrupted; {interrupted}")


def require_at_least(arguments: argparse.Namespace, **least: int) -> None:
    """Check the numbers of a command's flags; one that is not given passes.

    Args:
        least: name of the argument -> the smallest value.

    Raises:
        ValueError: names the first flag that is too small.
    """
    for name, smallest in least.items():
        value = getattr(arguments, name)
        if value is not None and value < smallest:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be at least {smallest}")


def note(text: str) -> None:
    """Say something that the user may want to know; nothing if the text is empty."""
    if text:
        print(f"note: {text}", file=sys.stderr)
