"""No reward without the work, and the whole reward for all honest work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from nb_lightning.rewards import Guarded, get_verifier
from tests.rewards.attacks import Attack, attacks

FUNCTION = {
    "entry": "total",
    "tests": [{"args": [[1, 2, 3]], "expect": 6}],
    "private": [{"args": [[10, 20]], "expect": 30}, {"args": [[]], "expect": 0}],
    "seconds": 0.5,
}
PROGRAM = {
    "tests": [{"stdin": "1 2\n", "expect": "3\n"}],
    "private": [{"stdin": "40 2\n", "expect": "42\n"}, {"stdin": "5 -5\n", "expect": "0\n"}],
    "seconds": 0.5,
}
HACKS = [(hack, FUNCTION) for hack in attacks("hacks_function")] + [
    (hack, PROGRAM) for hack in attacks("hacks_program")
]


@pytest.fixture(scope="module")
def code() -> Guarded:
    return get_verifier("code")


def block(code: str) -> str:
    return f"Here it is.\n\n```python\n{code}\n```\n"


@pytest.mark.parametrize("hack, reference", HACKS, ids=[hack.name for hack, _ in HACKS])
def test_a_hack_is_not_paid(code: Guarded, hack: Attack, reference: dict[str, Any]) -> None:
    [score] = code.score("", [block(hack.code)], reference)
    assert score.reward == 0 and score.info["status"] not in ("correct", "no_answer", "verifier_error"), score


def test_there_are_enough_hacks() -> None:
    assert len(HACKS) >= 15


# (what it is, code, entry or None for a program, [(arguments or input, what is expected), ...])
HONEST: Sequence[tuple[str, str, str | None, Sequence[tuple[Any, Any]]]] = [
    ("a function", "def f(a, b): return a + b", "f", [([1, 2], 3), (["a", "b"], "ab"), ([[1], [2]], [1, 2])]),
    ("a lambda", "f = lambda x: x * 2", "f", [([2], 4)]),
    ("a method", "class Solution:\n    def twice(self, x: int) -> int: return 2 * x", "Solution.twice", [([4], 8)]),
    ("types", "def f(x): return x", "f", [
        ([x], x) for x in (None, True, False, 0, -1, 10**40, 1.5, -0.0, "", "ä\U0001f600\x00", [], [[1, "a"], None],
                           {"a": [1]}, {"$tuple": [1, 2]}, {"$set": [1, "a"]}, {"$frozenset": []},
                           {"$dict": [[1, {"$tuple": []}]]}, {"$bytes": "00ff"},
                           {"$float": "nan"}, {"$float": "-inf"}, {"$complex": [1, 2]})
    ]),
    ("a tuple", "def f(x): return x, x", "f", [([1], {"$tuple": [1, 1]})]),
    ("a dict in another order", "def f(): return {'b': 1, 'a': {3, 1, 2}}", "f",
     [([], {"a": {"$set": [1, 2, 3]}, "b": 1})]),
    ("imports", """
import abc, array, ast, base64, bisect, calendar, cmath, collections, contextlib, copy, csv, dataclasses, datetime
import decimal, enum, fractions, functools, hashlib, heapq, html, io, itertools, json, math, operator, pprint, queue
import random, re, statistics, string, struct, textwrap, time, typing, unicodedata, urllib.parse, uuid, zlib
import xml.etree.ElementTree, email.message, colorsys, zoneinfo, shlex, tomllib, configparser, logging, argparse
def f(): return statistics.mean([1, 2, 3]) + len(xml.etree.ElementTree.fromstring("<a/>").tag)""", "f", [([], 3)]),
    ("a dataclass and an enum", """
from dataclasses import dataclass
from enum import Enum
class C(Enum): A = 1
@dataclass(order=True)
class P:
    x: int
    y: 'int' = 0
def f(x): return [P(x).y, C.A.value, P(1) < P(2)]""", "f", [([1], [0, 1, True])]),
    ("memoisation and deep recursion", """
import functools, sys
sys.setrecursionlimit(100000)
@functools.lru_cache(None)
def fib(n): return n if n < 2 else fib(n - 1) + fib(n - 2)
def depth(n): return 0 if n == 0 else 1 + depth(n - 1)
def f(n): return [fib(n), depth(n * 100)]""", "f", [([200], [280571172992510140037611932413038677189525, 20000])]),
    ("state between calls", "seen = []\ndef f(x):\n    seen.append(x)\n    return len(seen)", "f",
     [(["a"], 1), (["b"], 2)]),
    ("printing beside", "def f(x):\n    print('debug', x)\n    return x", "f", [([1], 1)]),
    ("a main guard", "def f(x): return x\nif __name__ == '__main__': print(f(int(input())))", "f", [([1], 1)]),
    ("random with a seed", "import random\ndef f(n):\n    random.seed(n)\n    return random.sample([n], 1)",
     "f", [([1], [1])]),
    ("input and print", "a, b = map(int, input().split())\nprint(a + b)", None, [("1 2\n", "3\n"), ("3 4", "7")]),
    ("all input", "import sys\nprint(sum(map(int, sys.stdin.read().split())))", None, [("1\n2\n3\n", "6")]),
    ("lines of input", "import sys\nfor line in sys.stdin: print(line.strip()[::-1])", None,
     [("ab\ncd\n", "ba\ndc\n")]),
    ("bytes of input", "import sys\nprint(sum(map(int, sys.stdin.buffer.readline().split())))", None,
     [("1 2\n", "3\n")]),
    ("descriptors", "import os\nos.write(1, str(len(open(0).read())).encode())", None, [("abc", "3")]),
    ("no input", "print('hello')", None, [("", "hello\n")]),
    ("white space at the ends", "print('a  ')\nprint('b', end='\\n\\n')", None, [("", "a\nb")]),
    ("unicode", "print(input() + '\\u00e9')", None, [("\u00fc\n", "\u00fc\u00e9\n")]),
    ("a main function", "def main():\n    print(int(input()) * 2)\nif __name__ == '__main__':\n    main()", None,
     [("4\n", "8\n")]),
    ("a thread with a large stack", """
import sys, threading
sys.setrecursionlimit(10**6)
threading.stack_size(64 << 20)
def depth(n): return 0 if n == 0 else 1 + depth(n - 1)
def main(): print(depth(int(input())))
thread = threading.Thread(target=main)
thread.start()
thread.join()""", None, [("50000\n", "50000\n")]),
    ("threads without a join", "import threading\nthreading.Thread(target=lambda: print(input())).start()", None,
     [("x", "x")]),
    ("output at the exit", "import atexit, io, os, sys\nsys.stdout = io.StringIO()\n"
     "atexit.register(lambda: os.write(1, sys.stdout.getvalue().encode()))\nprint(input())", None, [("x", "x")]),
    ("much output", "for i in range(50000): print(i)", None, [("", "".join(f"{i}\n" for i in range(50000)))]),
    ("much input", "print(len(input()))", None, [("x" * 2_000_000, "2000000")]),
    ("exit with success", "import sys\nprint(1)\nsys.exit()", None, [("", "1")]),
    ("a leave without clean-up", "import os\nprint(1, flush=True)\nos._exit(0)", None, [("", "1")]),
    ("a pool of threads", "from concurrent.futures import ThreadPoolExecutor\nwith ThreadPoolExecutor(4) as pool:\n"
     "    print(sum(pool.map(int, input().split())))", None, [("1 2 3", "6")]),
    ("memory within the limit", "x = bytearray(200 << 20)\nprint(len(x))", None, [("", str(200 << 20))]),
]  # fmt: skip


@pytest.mark.parametrize("source, entry, cases", [row[1:] for row in HONEST], ids=[row[0] for row in HONEST])
def test_honest_work_is_paid(code: Guarded, source: str, entry: str | None, cases: Sequence[tuple[Any, Any]]) -> None:
    given = "args" if entry else "stdin"
    reference: dict[str, Any] = {"tests": [{given: case, "expect": expect} for case, expect in cases]}
    if entry:
        reference["entry"] = entry
    [score] = code.score("", [block(source)], reference)
    assert score.reward == 1, score
    assert score.info == {"status": "correct", "passed": len(cases), "total": len(cases)}
