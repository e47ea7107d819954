"""The prompts of a refinement: one folder of Jinja templates a language; a file of the same name replaces one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nb_lightning.rewards.tasks import Task

SHIPPED = Path(__file__).parent / "prompts"
LANGUAGES = tuple(sorted(path.name for path in SHIPPED.iterdir() if path.is_dir()))
# name -> the variables that a template gets. Of each group it must read at least one, or the model would not see what
# it is asked about. `answer` is the draft's answer, `draft` its reasoning and answer, `verdicts` the critiques as text.
GROUPS: dict[str, tuple[tuple[str, ...], ...]] = {
    "checklist": (("task",),),
    "score": (("task",), ("answer", "draft"), ("dimensions",)),
    "critique": (("task",), ("answer", "draft")),
    "revise": (("task",), ("answer", "draft"), ("critiques", "verdicts")),
    "skeleton": (("task",), ("answer",)),
    "chain": (("task",), ("answer",)),
}
OPTIONAL: dict[str, tuple[str, ...]] = {
    "checklist": (),
    "score": ("checklist", "reasoning"),
    "critique": ("checklist", "reasoning", "verdict"),
    "revise": ("checklist", "reasoning", "verdict"),
    "skeleton": (),
    "chain": ("skeleton",),
}


@dataclass(frozen=True)
class Prompts:
    """The templates by name.

    Attributes:
        sources: name -> Jinja source.
    """

    sources: Mapping[str, str]

    def __post_init__(self) -> None:
        environment = ImmutableSandboxedEnvironment(
            undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
        )
        templates = {name: environment.from_string(source) for name, source in self.sources.items()}
        object.__setattr__(self, "_templates", templates)

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 of each template."""
        return {name: hashlib.sha256(source.encode()).hexdigest() for name, source in self.sources.items()}

    def messages(self, name: str, **variables: Any) -> list[dict[str, Any]]:
        """Render a template as the one user message of a call.

        Raises:
            ValueError: the template cannot be rendered; names it.
        """
        try:
            text = self._templates[name].render(**variables)  # type: ignore[attr-defined]
        except Exception as error:  # whatever a user's template raises
            raise ValueError(f"prompt {name}.jinja: {type(error).__name__}: {error}") from error
        return [{"role": "user", "content": text.strip()}]


def read_prompts(language: str, folder: str | None = None) -> Prompts:
    """Read the templates of a language; a file in `folder` replaces the shipped one of its name.

    Raises:
        ValueError: an unknown language; a folder that is not there or holds another .jinja file; a template with a
            syntax error, with an unknown variable, or that leaves out what its model must see.
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
    return Prompts({name: _read(name, path) for name, path in paths.items()})


def _read(name: str, path: Path) -> str:
    try:
        source = path.read_text(encoding="utf-8")
        variables = meta.find_undeclared_variables(jinja2.Environment().parse(source))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"{path}:{error.lineno}: {error.message}") from error
    allowed = {variable for group in GROUPS[name] for variable in group} | set(OPTIONAL[name])
    if unknown := sorted(variables - allowed):
        raise ValueError(f"{path} reads {unknown[0]!r}; its variables are {', '.join(sorted(allowed))}")
    for group in GROUPS[name]:
        if not variables & set(group):
            raise ValueError(f"{path} leaves out {{{{ {' }} and {{ '.join(group)} }}}}, so its model would not see it")
    return source


def task_text(task: Task) -> str:
    """Write a task's messages as one text: the question alone, or each message under its role."""
    if len(task.messages) == 1:
        return str(task.messages[0].get("content") or "")
    return "\n\n".join(f"[{m['role']}]\n{m.get('content') or ''}" for m in task.messages)
