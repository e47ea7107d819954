"""Find the answer in a completion. Each rule reads the text once; none uses a regular expression that could hang."""

from __future__ import annotations

from nb_lightning.text.thoughts import END_OF_THINK, THINK

MARK = "Answer:"
PYTHON = ("python", "python3", "py")


def after_thinking(completion: str) -> str:
    """Return the text after the reasoning; "" if the reasoning does not end (the completion was cut off in it)."""
    response = completion.rpartition(END_OF_THINK)[2]
    return "" if response.lstrip().startswith(THINK) else response


def fold(text: str) -> str:
    """Replace each run of white space by one space, and strip the ends."""
    return " ".join(text.split())


def after_mark(text: str) -> str | None:
    """Return the text after the last "Answer:"; None without one."""
    _, mark, answer = text.rpartition(MARK)
    return answer if mark else None


def answer_line(text: str, mark: str = MARK) -> str | None:
    """Return the rest of the line after the last `mark`, without **bold** or a full stop; None without a mark.

    If nothing follows the mark on its line, return the next line.
    """
    _, found_mark, answer = text.rpartition(mark)
    lines = [line for line in answer.splitlines() if line.strip(" \t*")] if found_mark else []
    if not lines:
        return None
    line = lines[0].strip(" \t*")
    return line[:-1].rstrip() if line.endswith(".") else line


def boxed(text: str) -> str | None:
    r"""Return the content of the last closed \boxed{...}; None without one."""
    for start in _last_positions(text, "\\boxed"):
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
    """Return the last closed ``` block that names Python, else the last that names no language; None without one.

    A block without a language is often a program's output. As in CommonMark, the first word after the opening fence is
    the language, the closing fence is at least as long, and the fence's indentation is taken off each line.
    """
    blocks: dict[str, str] = {}  # the last one of each language
    fence, language, indentation, lines = 0, "", 0, []
    for line in text.splitlines():
        stripped = line.strip()
        ticks = len(stripped) - len(stripped.lstrip("`"))
        if not fence and ticks >= 3:
            fence, indentation, lines = ticks, len(line) - len(line.lstrip()), []
            words = stripped[ticks:].replace("{", " ").replace(",", " ").split()
            language = words[0].lower() if words else ""
        elif fence and ticks >= fence and ticks == len(stripped):
            blocks["python" if language in PYTHON else language] = "\n".join(lines) + "\n"
            fence = 0
        elif fence:
            lines.append(line[min(indentation, len(line) - len(line.lstrip())) :])
    return blocks.get("python", blocks.get(""))


def _last_positions(text: str, word: str) -> list[int]:
    """Find where `word` begins, last first: at most 8, because each costs the caller a walk to the end of the text."""
    positions = []
    end = len(text)
    while len(positions) < 8 and (end := text.rfind(word, 0, end)) >= 0:
        positions.append(end)
    return positions
