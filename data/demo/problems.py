"""Generate the problems of the demo tasks: nine families of random problems, each with a worked answer.

Each family is a miniature of a domain of the paper's SFT data, small enough for a model of 0.8 M parameters over bytes
to learn in minutes.

| family | stands for | asks for |
|---|---|---|
| maths_sort | maths (the headline task) | 3 to 7 different letters in order |
| maths_equations | maths | x of a x + b = c |
| maths_sums | maths | a sum of two or three terms |
| science_laws | science | one step of a law of physics |
| science_binary | science | a number in binary |
| code_functions | code | a Python function of one line, checked by running it |
| general_words | general | a small chore with words |
| general_spelling | general | a word backwards |
| tools_calls | agent and tools | a tool call, and a sentence made of its result |
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nb_lightning.text.messages import assistant_message

LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = (
    "air ant apple arm ball bank bear bell bird boat bone book boot bowl box bread brick bus cake camel car cat chair "
    "child city cloud coat coin corn cow crab cup deer desk dog door dress drum duck eagle ear earth egg eye farm "
    "field fire fish flag flower fly foot forest fox frog garden gate ghost glass goat gold grass green hair hand hat "
    "heart hill home honey horse house ice iron island jar juice key king kite knife lake lamp leaf lemon light lion "
    "map milk mirror moon mouse music nail nest night north nose ocean onion orange owl paint paper park pear pencil "
    "piano pig plane plate pond queen rain red ring river road rock roof rope rose salt sand school sea seed sheep "
    "shell ship shoe silver sky snow soap sock south spoon star stone storm street sugar sun table tail tea tiger "
    "time tooth town train tree wall water wave wheel white wind window winter wolf wood wool world yellow zebra"
).split()
NAMES = (
    "Ana Ben Carl Dora Emil Fay Gina Hugo Ida Jan Kim Lea Max Nora Otto Pia Rosa Sam Tom Una Vera Will Yan Zoe".split()
)
CITIES = (
    "Accra Athens Berlin Bern Bogota Boston Cairo Dakar Delhi Dublin Hanoi Kyiv Lagos Lima Lisbon London Madrid Milan "
    "Moscow Nairobi Oslo Paris Perth Prague Quito Riga Rome Seoul Sofia Sydney Tokyo Tunis Vienna Warsaw"
).split()


@dataclass(frozen=True)
class Problem:
    """A question with its worked answer.

    Attributes:
        key: identifies the problem in any wording; problems of one key share a split.
        messages: the whole chat with the worked answer; the assistant's reasoning is in `reasoning_content`.
        verifier, reference: judge an answer; as in `nb_lightning.rewards.tasks.Task`.
    """

    key: str
    messages: list[dict[str, Any]]
    verifier: str
    reference: Any


def maths_sort(rng: random.Random) -> Problem:
    letters = rng.sample(LETTERS, rng.randint(3, 7))
    order, left, steps = sorted(letters), list(letters), []
    for letter in order:  # each line: the smallest letter, and the letters left
        left.remove(letter)
        steps.append(f"{letter} {''.join(left)}".strip())
    return _worked("".join(order), f"Sort {''.join(letters)}", "\n".join(steps), "".join(order))


def maths_equations(rng: random.Random) -> Problem:
    a, x, b = rng.randint(2, 9), rng.randint(-12, 12), _not_zero(rng, 30)
    c, product = a * x + b, a * x
    return _worked(
        f"{a} {b} {c}",
        f"Solve {a}x {_signed(b)} = {c}",
        f"{a}x = {c} {_signed(-b)} = {product}\nx = {product} / {a} = {x}",
        str(x),
    )


def maths_sums(rng: random.Random) -> Problem:
    total = rng.randint(1, 50)
    text, steps = str(total), []
    for _ in range(rng.randint(1, 2)):
        term = _not_zero(rng, 20)
        step = f"{total} {_signed(term)}"
        text, total = f"{text} {_signed(term)}", total + term
        steps.append(f"{step} = {total}")
    return _worked(text, f"What is {text}?", "\n".join(steps), str(total))


LAWS = (  # result = first x second
    ("U", "R", "I", "volts", "ohm", "ampere"),
    ("P", "U", "I", "watts", "volt", "ampere"),
    ("F", "m", "a", "newtons", "kg", "m/s2"),
    ("s", "v", "t", "metres", "m/s", "s"),
    ("W", "F", "s", "joules", "N", "m"),
    ("m", "d", "V", "grams", "g/ml", "ml"),
    ("F", "p", "A", "newtons", "pascal", "m2"),
    ("F", "k", "x", "newtons", "N/m", "m"),
    ("Q", "I", "t", "coulombs", "ampere", "s"),
    ("P", "F", "v", "watts", "N", "m/s"),
)


def science_laws(rng: random.Random) -> Problem:
    result, first, second, unit, *units = rng.choice(LAWS)
    a, b = rng.randint(2, 12), rng.randint(2, 12)
    return _worked(
        f"{result} {first} {a} {b}",
        f"{first} = {a} {units[0]}, {second} = {b} {units[1]}. How many {unit}?",
        f"{result} = {first} {second} = {a} * {b} = {a * b}",
        str(a * b),
    )


def science_binary(rng: random.Random) -> Problem:
    number = left = rng.randint(4, 1023)
    steps = []
    while left:  # each line: the number left, and its last bit
        steps.append(f"{left} {left % 2}")
        left //= 2
    return _worked(str(number), f"Write {number} in binary", "\n".join(steps), f"{number:b}")


def code_functions(rng: random.Random) -> Problem:
    kind = rng.choice(("numbers", "values", "strings"))
    if kind == "values":
        a, b = rng.randint(2, 9), _not_zero(rng, 9)
        values = ", ".join(f"f({x}) = {a * x + b}" for x in range(3))
        reasoning = f"{a + b} {_signed(-b)} = {a}"
        return _function(f"Write f(x): {values}", reasoning, "x", f"{a} * x {_signed(b)}", [-3, 0, 1, 2, 10])
    if kind == "numbers":
        steps, body = [], "x"
        for _ in range(rng.randint(2, 3)):
            name, n = rng.choice(("add", "subtract", "multiply by")), rng.randint(2, 9)
            steps.append(f"{name} {n}")
            factor = f"({body})" if "+" in body or "-" in body else body
            body = {"add": f"{body} + {n}", "subtract": f"{body} - {n}", "multiply by": f"{factor} * {n}"}[name]
        return _function(f"Write f(x): {', '.join(steps)}", "", "x", body, [-3, 0, 1, 2, 10])
    steps, body = [], "s"
    for _ in range(rng.randint(1, 3)):
        letter = rng.choice("abcdwxyz")
        name = rng.choice(("backwards", "capitals", "twice", f"add {letter}", f"put {letter} first"))
        steps.append(name)
        operand = f"({body})" if " " in body else body
        body = {
            "backwards": f"{operand}[::-1]",
            "capitals": f"{operand}.upper()",
            "twice": f"{operand} * 2",
            f"add {letter}": f'{body} + "{letter}"',
            f"put {letter} first": f'"{letter}" + {body}',
        }[name]
    return _function(f"Write f(s): {', '.join(steps)}", "", "s", body, ["", "a", "Bc d", "xyzzy"])


def general_words(rng: random.Random) -> Problem:
    word, other = rng.sample(WORDS, 2)
    n = rng.randint(2, 4)
    question, answer = rng.choice(
        (
            (f"Say {word} {n} times", " ".join([word] * n)),
            (f"Write {word} in capitals", word.upper()),
            (f"What is the first letter of {word}?", word[0]),
            (f"What is the last letter of {word}?", word[-1]),
            (f"Swap {word} and {other}", f"{other} and {word}"),
            (f"Add {other} to the list: {word}", f"{word}, {other}"),
        )
    )
    return Problem(question, [_user(question), assistant_message(answer)], "exact", answer)


def general_spelling(rng: random.Random) -> Problem:
    word = "".join(rng.choice("bcdfghjklmnprstvwz") + rng.choice("aeiou") for _ in range(4))[: rng.randint(3, 8)]
    return Problem(word, [_user(f"Spell {word} backwards"), assistant_message(word[::-1])], "exact", word[::-1])


def tools_calls(rng: random.Random) -> Problem:
    kind = rng.choice(("weather", "time", "add", "call"))
    city, hour = rng.choice(CITIES), f"{rng.randint(0, 23):02}:{rng.randint(0, 59):02}"
    if kind == "weather":
        day = rng.choice("Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split())
        sky = rng.choice("sunny cloudy rainy windy".split())
        return _tool(
            f"How will the weather be in {city} on {day}?",
            "weather",
            {"city": city, "day": day},
            sky,
            f"It will be {sky} in {city} on {day}.",
        )
    if kind == "time":
        return _tool(f"What time is it in {city}?", "time", {"city": city}, hour, f"It is {hour} in {city}.")
    if kind == "add":
        a, b = rng.randint(100, 999), rng.randint(100, 999)
        return _tool(f"Add {a} and {b}", "add", {"a": a, "b": b}, str(a + b), f"{a} + {b} = {a + b}.")
    name = rng.choice(NAMES)
    return _tool(f"Call {name} at {hour}", "call", {"who": name, "at": hour}, "ok", f"I will call {name} at {hour}.")


FAMILIES: dict[str, Callable[[random.Random], Problem]] = {
    family.__name__: family
    for family in (
        maths_sort,
        maths_equations,
        maths_sums,
        science_laws,
        science_binary,
        code_functions,
        general_words,
        general_spelling,
        tools_calls,
    )
}


def _worked(key: str, question: str, reasoning: str, answer: str) -> Problem:
    return Problem(key, [_user(question), assistant_message(f"Answer: {answer}", reasoning)], "exact", answer)


def _function(question: str, reasoning: str, argument: str, body: str, inputs: list[Any]) -> Problem:
    """Build a problem whose tests are the results of the worked answer. All tests but two are private.

    The worked answer is generated here, not by a model, so it may be run in this process.
    """
    function = eval(f"lambda {argument}: {body}")
    tests = [{"args": [value], "expect": function(value)} for value in inputs]
    answer = f"```python\ndef f({argument}): return {body}\n```"
    reference = {"entry": "f", "tests": tests[:2], "private": tests[2:]}
    return Problem(question, [_user(question), assistant_message(answer, reasoning)], "code", reference)


def _tool(question: str, name: str, arguments: dict[str, Any], result: str, answer: str) -> Problem:
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    messages = [
        _user(question),
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": name, "content": result},
        assistant_message(answer),
    ]
    return Problem(question, messages, "tool_call", {"name": name, "arguments": arguments})


def _user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def _not_zero(rng: random.Random, largest: int) -> int:
    return rng.choice((-1, 1)) * rng.randint(1, largest)


def _signed(number: int) -> str:
    return f"+ {number}" if number >= 0 else f"- {-number}"
