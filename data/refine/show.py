"""Print the history of one instruction, in colour on a terminal; write an HTML page of samples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import jinja2
from rich import markup
from rich.console import Console, RenderableType
from rich.panel import Panel
from rich.rule import Rule

from data.refine.drafts import Chain, Draft, History
from data.refine.make import read_histories
from data.refine.prompts import task_text
from nb_lightning.files import write_text

PAGE = Path(__file__).with_name("samples.html.jinja")
PAGE_SAMPLES = 50  # histories on a page, half of them with revisions
SHOWN = 3  # ids in a message


def show(folder: Path, task_id: str, console: Console | None = None) -> None:
    """Print everything about the instruction with this id; about each, where several sources have one.

    Raises:
        ValueError: no finished run in `folder`, or no such instruction.
    """
    console = console or Console()
    first: list[str] = []
    n = n_shown = 0
    for history in read_histories(folder):
        n += 1
        if history.task.id == task_id:
            console.print(*_blocks(history), sep="\n")
            n_shown += 1
        elif len(first) < SHOWN:
            first.append(history.task.id)
    if not n_shown:
        more = f" and {n - SHOWN:,} more" if n > SHOWN else ""
        raise ValueError(f"{folder} has no instruction {task_id!r}; it has {', '.join(first)}{more}")


def escape(text: str) -> str:
    """Show a text as it is: neither its brackets nor its control characters are obeyed."""
    return markup.escape("".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text))


def _blocks(history: History) -> Iterator[RenderableType]:
    yield Rule(f"[bold]{escape(history.task.id)}[/] ({escape(history.task.source)})")
    yield Panel(escape(task_text(history.task)), title="instruction", border_style="blue")
    if history.checklist:
        yield Panel("\n".join(f"{n}. {escape(item)}" for n, item in enumerate(history.checklist, 1)), title="checklist")
    for index, draft in enumerate(history.drafts):
        yield _draft_panel(draft, index == history.best)
    for number, chain in enumerate(history.chains, 1):
        yield _chain_panel(chain, number)
    tokens = ", ".join(f"{role} {count:,}" for role, count in history.tokens.items())
    outcome = f"[red]dropped: {escape(history.dropped)}[/]" if history.dropped else "[green]kept[/]"
    yield f"{outcome}; {history.rounds} rounds; tokens: {tokens}\n"


def _draft_panel(draft: Draft, is_best: bool) -> Panel:
    lines = [f"[dim]{escape(draft.reasoning)}[/]\n"] if draft.reasoning else []
    lines.append(escape(draft.content) or "[dim](no answer)[/]")
    for critique in draft.critiques or []:
        item = f"item {critique.item}, " if critique.item else ""
        place = f"{item}{escape(critique.where)}: " if item or critique.where else ""
        lines.append(f"[yellow]✗ {place}{escape(critique.problem)} → {escape(critique.fix)}[/]")
    if draft.critiques == []:
        lines.append("[yellow]the critic finds no problem[/]")
    scores = ", ".join(f"{name} {score:.2f}" for name, score in draft.scores.items())
    facts = [draft.status or draft.finish, scores, "passes" if draft.passed else "", "best" if is_best else ""]
    color = "green" if draft.passed else "red"
    return Panel("\n".join(lines), title=escape(draft.name), subtitle=escape("; ".join(filter(None, facts))),
                 border_style=color)  # fmt: skip


def _chain_panel(chain: Chain, number: int) -> Panel:
    lines = [f"[dim]{escape(chain.skeleton)}[/]\n"] if chain.skeleton else []
    lines += [escape(chain.reasoning), f"→ {escape(chain.own_answer)}"]
    anchoring = [("lexical", chain.lexical), ("probability", chain.probability)]
    facts = [f"{name} anchoring {value:.2f}" for name, value in anchoring if value is not None]
    if chain.lines_checked:
        facts.append(f"{chain.lines_valid} of {chain.lines_checked} lines hold")
    subtitle = escape("; ".join(filter(None, [*facts, chain.problem])))
    color = "red" if chain.problem else "green"
    return Panel("\n".join(lines), title=f"chain {number}", subtitle=subtitle, border_style=color)


def write_page(folder: Path, path: Path, samples: int = PAGE_SAMPLES) -> None:
    """Write an HTML page of histories, half of them with revisions where there are enough."""
    chosen = _choose(read_histories(folder), samples)
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(PAGE.read_text(encoding="utf-8"))
    write_text(path, page.render(histories=chosen, folder=folder.name, task_text=task_text))


def _choose(histories: Iterable[History], samples: int) -> list[History]:
    revised: list[History] = []
    direct: list[History] = []
    for history in histories:
        target = revised if history.rounds else direct
        if len(target) < samples:
            target.append(history)
        if len(revised) >= samples and len(direct) >= samples:
            break
    n = max(samples // 2, samples - len(direct))
    return [*islice(revised, n), *islice(direct, samples - min(n, len(revised)))]
