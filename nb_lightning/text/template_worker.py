"""The process in which chat templates run: a script that template_process.py starts, outside the library.

A template is a program that we do not trust. It runs in Jinja's immutable sandbox, with a limit on CPU time that the
kernel enforces (the default action of SIGPROF ends the process, whatever it is doing), a limit on memory, and no files
to write. A frame is 4 bytes of length and JSON, in both directions. The first one is the setup, each later one a job:

    {"source", "special", "now", "cpu_s", "bytes", "characters"}
    [group, ...]  ->  [{"texts": [...]} or {"error": "..."}, ...]

    group: [[messages, tools, prompt, variables, marks], ...], or "variables"

All texts of a group are rendered under one limit on time, or none; `prompt` is the template's add_generation_prompt.
`variables` are further variables of the template by name. With `marks` [open, close], the text of each
{% generation %} block is written between the two strings. The group "variables" asks for the names that the template
reads.
"""

from __future__ import annotations

import json
import resource
import signal
import struct
import sys
from contextlib import suppress
from datetime import datetime
from typing import Any, BinaryIO

from jinja2 import TemplateError, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment


class Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, and the two strings to write around generation blocks."""

    marks = ("", "")


class Generation(Extension):
    """The tag `{% generation %} ... {% endgeneration %}`, around what the assistant writes."""

    tags = {"generation"}
    environment: Environment

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_wrap"), [], [], body).set_lineno(line)

    def _wrap(self, caller: Any) -> str:
        open_, close = self.environment.marks
        return f"{open_}{caller()}{close}"


class TooLong(Exception):
    """The text has more characters than allowed."""


def build(setup: dict[str, Any]) -> Any:
    """Compile the template in an environment like that of transformers."""
    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    now = datetime.fromisoformat(setup["now"]) if setup["now"] else None

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(form: str) -> str:
        return (now or datetime.now()).strftime(form)

    environment.filters["tojson"] = tojson  # Jinja's own escapes <, > and & for HTML
    environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now, **setup["special"])
    return environment.from_string(setup["source"])


def render(template: Any, job: list[Any], max_characters: int) -> str:
    """Render one text.

    Raises:
        TooLong: the text has more than `max_characters`.
    """
    messages, tools, add_generation_prompt, variables, marks = job
    template.environment.marks = marks
    conversation = {"messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt}
    pieces, size = [], 0
    for piece in template.generate({"documents": None, **variables, **conversation}):  # documents: as transformers does
        size += len(piece)
        if size > max_characters:
            raise TooLong(f"writes more than {max_characters:,} characters")
        pieces.append(piece)
    return "".join(pieces)


def names_read(template: Any, source: str) -> list[str]:
    """List the variables that a template reads and does not set itself."""
    environment = template.environment
    return sorted(meta.find_undeclared_variables(environment.parse(source)))


def read(stream: BinaryIO) -> Any:
    """Read one frame; exit if the caller has closed the pipe."""
    size = stream.read(4)
    if len(size) < 4:
        sys.exit()
    return json.loads(stream.read(struct.unpack("<I", size)[0]))


def failure(reason: str) -> str:
    return json.dumps({"error": reason[:500]})


def main() -> None:
    stdin, stdout = sys.stdin.buffer, sys.stdout.buffer
    setup = read(stdin)
    for limit, value in ((resource.RLIMIT_AS, setup["bytes"]), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        with suppress(ValueError, OSError):  # a system without this limit
            resource.setrlimit(limit, (value, value))
    template = None
    while True:
        answers = []
        for group in read(stdin):
            signal.setitimer(signal.ITIMER_PROF, setup["cpu_s"])
            try:
                template = template or build(setup)  # within the limit: compiling folds constants, so it runs code
                if group == "variables":
                    texts = names_read(template, setup["source"])
                else:
                    texts = [render(template, job, setup["characters"]) for job in group]
                answer = json.dumps({"texts": texts})
            except TemplateError as error:
                number = getattr(error, "lineno", None)  # syntax errors have one
                line = f" (line {number})" if number else ""
                answer = failure(f"{error.message or type(error).__name__}{line}")
            except TooLong as error:
                answer = failure(str(error))
            except MemoryError:
                answer = failure(f"needs more than {setup['bytes'] // 2**20:,} MiB of memory")
            except Exception as error:  # an expression in a template can raise anything
                answer = failure(f"{type(error).__name__}: {error}")
            signal.setitimer(signal.ITIMER_PROF, 0)
            answers.append(answer)
        payload = f"[{','.join(answers)}]".encode()
        stdout.write(struct.pack("<I", len(payload)) + payload)
        stdout.flush()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the caller's to handle; it closes the pipe
    main()
