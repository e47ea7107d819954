"""Errors that end a command with one line to the user instead of a traceback."""

from __future__ import annotations

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
