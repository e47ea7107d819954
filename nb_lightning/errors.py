"""Errors that end a run with one line to the user instead of a traceback."""


class RunStopped(RuntimeError):
    """The run cannot go on. The message says why, what is safe, and how to continue."""
