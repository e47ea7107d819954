"""Where in a completion the answer is. Each rule reads the text once: no regular expression that could hang."""

from __future__ import annotations

THINK, END_OF_THINK = "<think>", "</think>"
MARK = "Answer:"
PYTHON = ("", "python", "python3", "py")


def after_thinking(completion: str) -> str:
    """What comes after the reasoning; nothing where the reasoning has no end (the completion was cut off in it)."""
    said = completion.rpartition(END_OF_THINK)[2]
    return "" if said.lstrip().startswith(THINK) else said


def fold(text: str) -> str:
    """`text` with each run of white space as one space, none at the ends."""
    return " ".join(text.split())


def after_mark(text: str) -> str | None:
    """All that follows the last "Answer:"; None where there is none."""
    _, found, answer = text.rpartition(MARK)
    return answer if found else None


def answer_line(text: str, mark: str = MARK) -> str | None:
    """The line of the last `mark` (the next one where nothing follows on that line), without **bold** or a stop."""
    _, found, answer = text.rpartition(mark)
    lines = [line for line in answer.splitlines() if line.strip(" \t*")] if found else []
    if not lines:
        return None
    line = lines[0].strip(" \t*")
    return line[:-1].rstrip() if line.endswith(".") else line


def boxed(text: str) -> str | None:
    r"""What the last closed \boxed{...} holds."""
    for start in _places(text, "\\boxed"):
        opening = text.find("{", start)
        if opening < 0 or text[start + len("\\boxed") : opening].strip():
            continue
        depth = 0
        for i in range(opening, len(text)):
            if text[i] == "{" and text[i - 1] != "\\":
                depth += 1
            elif text[i] == "}" and text[i - 1] != "\\":
                depth -= 1
                if depth == 0:
                    return text[opening + 1 : i].strip()
    return None


def code_block(text: str) -> str | None:
    """The last closed ``` block that is Python or says no language."""
    found: str | None = None
    fence, python, lines = "", False, []
    for line in text.splitlines():
        stripped = line.strip()
        ticks = len(stripped) - len(stripped.lstrip("`"))
        if not fence and ticks >= 3:
            fence, python, lines = "`" * ticks, stripped[ticks:].strip().lower() in PYTHON, []
        elif fence and stripped == fence:
            found = "\n".join(lines) + "\n" if python else found
            fence = ""
        elif fence:
            lines.append(line)
    return found


def _places(text: str, word: str) -> list[int]:
    """Where `word` is, last first; the last few only, for each costs a walk to the end of the text."""
    places = []
    end = len(text)
    while len(places) < 8 and (end := text.rfind(word, 0, end)) >= 0:
        places.append(end)
    return places
