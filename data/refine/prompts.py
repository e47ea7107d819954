"""The prompts of a refinement: one folder of Jinja templates a language; a file of the same name replaces one.

Templates write what others have written with the filter `tagged`: `{{ task | tagged("task") }}` is the task between
<task> and </task>, or between longer tags if it has </task> itself. So no text can end its own place in a prompt.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from data.refine.drafts import Critique
from nb_lightning.rewards.tasks import Task
from nb_lightning.text.messages import check_messages

SHIPPED = Path(__file__).parent / "prompts"
LANGUAGES = tuple(sorted(path.name for path in SHIPPED.iterdir() if path.is_dir()))
# name -> the variables that a template gets. Of each group it must read at least one, or the model would not see what
# it is asked about. `answer` is the draft's answer, `draft` its reasoning and answer, `verdicts` the signs of lines,
# `own_answer` what the writer of a chain concluded.
# "verifier_item" is no prompt: it is the checklist's first item where the task has a verifier.
GROUPS: dict[str, tuple[tuple[str, ...], ...]] = {
    "verifier_item": (),
    "checklist": (("task",),),
    "score": (("task",), ("answer", "draft"), ("dimensions",)),
    "critique": (("task",), ("answer", "draft")),
    "revise": (("task",), ("answer", "draft"), ("critiques", "verdicts")),
    "skeleton": (("task",), ("answer",)),
    "chain": (("task",), ("answer",)),
    "same": (("answer",), ("own_answer",)),
}
OPTIONAL: dict[str, tuple[str, ...]] = {
    "score": ("checklist", "reasoning"),
    "critique": ("checklist", "reasoning", "verdict"),
    "revise": ("checklist", "reasoning", "verdict"),
    "chain": ("skeleton",),
    "same": ("task",),
}
# With these a template is tried before any call is made.
FULL: dict[str, Any] = {
    **{name: name for name in ("task", "answer", "own_answer", "draft", "reasoning")},
    **{name: name for name in ("skeleton", "verdict", "verdicts")},
    "checklist": ["c"], "dimensions": {"correctness": ""},
    "critiques": [Critique(1, "w", "p", "f"), Critique(None, "", "p", "f")],
}  # fmt: skip
EMPTY = {
    **FULL,
    **dict.fromkeys(("reasoning", "skeleton", "verdict", "verdicts"), ""),
    "checklist": [],
    "critiques": [],
}


def tagged(text: str, tag: str) -> str:
    """Write text between tags that it does not contain."""
    name = next(name for n in count(1) if f"</{(name := tag if n == 1 else f'{tag}_{n}')}>" not in text)
    return f"<{name}>\n{text}\n</{name}>"


ENVIRONMENT = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
ENVIRONMENT.filters["tagged"] = tagged


@dataclass(frozen=True)
class Prompts:
    """The templates by name.

    Attributes:
        sources: name -> Jinja source.
    """

    sources: Mapping[str, str]

    def __post_init__(self) -> None:
        templates = {name: ENVIRONMENT.from_string(source) for name, source in self.sources.items()}
        object.__setattr__(self, "_templates", templates)

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 of each template."""
        return {name: hashlib.sha256(source.encode()).hexdigest() for name, source in self.sources.items()}

    def text(self, name: str, **variables: Any) -> str:
        """Render a template.

        Raises:
            ValueError: it cannot be rendered; names it.
        """
        try:
            return self._templates[name].render(**variables).strip()  # type: ignore[attr-defined]
        except Exception as error:  # whatever a user's template raises
            raise ValueError(f"prompt {name}.jinja: {type(error).__name__}: {error}") from error

    def messages(self, name: str, **variables: Any) -> list[dict[str, Any]]:
        """Render a template as the one user message of a call; raises as `text`."""
        return [{"role": "user", "content": self.text(name, **variables)}]


def read_prompts(language: str, folder: str | None = None, critiques: str = "json") -> Prompts:
    """Read the templates of a language; a file in `folder` replaces the shipped one of its name.

    Args:
        critiques: of the plan. Only "lines" has `verdicts`.

    Raises:
        ValueError: an unknown language; a folder that is not there or holds another .jinja file; a template that
            cannot be rendered, has an unknown variable, or leaves out what its model must see.
    """
    if language not in LANGUAGES:
        raise ValueError(f"language is {language!r}; allowed: {', '.join(LANGUAGES)}")
    paths = {name: SHIPPED / language / f"{name}.jinja" for name in GROUPS}
    if folder is not None:
        if not Path(folder).is_dir():
            raise ValueError(f"prompts: {folder} is no folder")
        for path in sorted(Path(folder).glob("*.jinja")):
            if path.stem not in GROUPS:
                raise ValueError(f"prompts: {path} replaces no template; their names are {', '.join(GROUPS)}")
            paths[path.stem] = path
    missing = () if critiques == "lines" else ("verdicts",)
    return Prompts({name: _read(name, path, missing) for name, path in paths.items()})


def _read(name: str, path: Path, missing: tuple[str, ...]) -> str:
    """Read a template and check it.

    Args:
        missing: variables that the plan does not have.
    """
    try:
        source = path.read_text(encoding="utf-8")
        variables = meta.find_undeclared_variables(ENVIRONMENT.parse(source))
        template = ENVIRONMENT.from_string(source)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"{path}:{error.lineno}: {error.message}") from error
    groups = [[variable for variable in group if variable not in missing] for group in GROUPS[name]]
    allowed = {variable for group in groups for variable in group} | set(OPTIONAL.get(name, ()))
    if unknown := sorted(variables - allowed):
        raise ValueError(f"{path} reads {unknown[0]!r}; its variables are {', '.join(sorted(allowed)) or 'none'}")
    for group in groups:
        if not variables & set(group):
            raise ValueError(f"{path} leaves out {{{{ {' }} and {{ '.join(group)} }}}}, so its model would not see it")
    try:
        texts = [template.render({v: values[v] for v in allowed}) for values in (FULL, EMPTY)]
    except Exception as error:  # whatever a user's template raises
        raise ValueError(f"{path}: {type(error).__name__}: {error}") from error
    if not all(map(str.strip, texts)):
        raise ValueError(f"{path} is empty")
    return source


def task_text(task: Task) -> str:
    """Write a task as one text: the question alone, or its tools and each message under its role."""
    messages = check_messages(task.messages)
    if len(messages) == 1 and not task.tools:
        return messages[0]["content"]
    tools = [json.dumps(tool, ensure_ascii=False) for tool in task.tools or ()]
    parts = [("tools", "\n".join(tools))] if tools else []
    parts += [(message["role"], _message_text(message)) for message in messages]
    return "\n\n".join(f"[{name}]\n{text}" for name, text in parts)


def _message_text(message: Mapping[str, Any]) -> str:
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", ())]
    return "\n".join(filter(None, [message["content"], *calls]))
