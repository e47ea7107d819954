"""Ask an engine: what the journal has is not asked again, what comes is journaled, and limits are kept."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data.calls.budget import Budget, BudgetSpent, Spent
from data.calls.call import Call, Failure, Reply
from data.calls.engine import Engine
from data.calls.journal import JOURNAL, Journal, compact_key

MAX_FAILED = 0.01
NO_LIMIT = Budget()


class TooManyFailed(ValueError):
    """More calls got no reply than `Caller.max_failed` allows. The replies so far are in the journal."""


@dataclass
class Counts:
    """The distinct calls of one role.

    Attributes:
        cached: of them, those whose reply was in the journal.
        spent: on the replies, cached ones included, so that it does not depend on stops.
    """

    calls: int = 0
    cached: int = 0
    spent: Spent = field(default_factory=Spent)


class Caller:
    """Asks engines, with one journal and one budget for all calls of a folder.

    Args:
        folder: the journal is `calls.jsonl` in it.
        budget: limits on all calls of the folder, earlier runs included.
        max_failed: the share of calls that may end without a reply.

    Attributes:
        kept: what the progress line shows as kept; the owner may set it at any time.

    Raises:
        ValueError: `max_failed` is not from 0 to 1.
    """

    def __init__(self, folder: Path, budget: Budget = NO_LIMIT, max_failed: float = MAX_FAILED) -> None:
        if not 0 <= max_failed <= 1:
            raise ValueError(f"--max-failed is {max_failed}; it must be from 0 to 1")
        self.budget, self.max_failed = budget, max_failed
        self.journal = Journal(folder / JOURNAL)
        self.kept: int | None = None
        self._spent = Spent()  # on all that the journal has
        self._roles: dict[str, Counts] = {}
        self._asked: set[bytes] = set()  # compact keys
        self._failed: dict[str, tuple[str, Failure]] = {}  # key -> role, and why there is no reply
        self._retries: Counter[str] = Counter()  # kind -> attempts
        self._lock = threading.Lock()

    def ask(self, engine: Engine, calls: Sequence[Call], role: str) -> list[Reply | None]:
        """Answer calls from the journal, or else from the engine.

        Args:
            role: who is asked ("teacher", "critic", ...), for the counts.

        Returns:
            For each call its reply, or None where none came. A failed call is asked again when it is asked for next.

        Raises:
            BudgetSpent: a limit is reached.
            TooManyFailed: `max_failed` is exceeded.
            Refused: the engine refuses the calls.
            ValueError: the journal is damaged, or another process writes it.
        """
        if not calls:
            return []
        about = engine.about()
        keys = [call.key(about) for call in calls]
        with self.journal.open(self._spent.add):
            left = self._count_asked(keys, role)
            with tqdm(total=len(calls), initial=len(calls) - len(left), desc=role, unit="call", disable=None) as bar:
                while left:
                    self._require_budget()
                    now = left[: self.budget.calls_left(self._spent)]
                    left = left[len(now) :]
                    answered = self._answer(engine, {keys[i]: calls[i] for i in now}, role, "url" in about, bar)
                    if answered < len(now):
                        self._require_budget()
                    self._require_replies()
            return [self.journal.read(key) if key in self.journal else None for key in keys]

    def summary(self) -> dict[str, Any]:
        """Count what this object was asked, over all and by role.

        "cached", "failed", "failures" (by reason) and "retries" (by kind of the failed attempt) are of this process.
        Tokens and cost are of all replies, cached ones included.
        """
        total = Counts()
        for counts in self._roles.values():
            total.calls, total.cached = total.calls + counts.calls, total.cached + counts.cached
            total.spent += counts.spent
        failed = Counter(role for role, _ in self._failed.values())
        return {
            **self._numbers(total, len(self._failed)),
            "failures": dict(self._reasons().most_common()),
            "retries": dict(self._retries.most_common()),
            "roles": {role: self._numbers(counts, failed[role]) for role, counts in self._roles.items()},
        }

    def _numbers(self, counts: Counts, failed: int) -> dict[str, Any]:
        return {
            "calls": counts.calls,
            "cached": counts.cached,
            "failed": failed,
            "prompt_tokens": counts.spent.prompt_tokens,
            "completion_tokens": counts.spent.completion_tokens,
            "cost": self.budget.cost(counts.spent),
        }

    def _reasons(self) -> Counter[str]:
        return Counter(failure.reason for _, failure in self._failed.values())

    def _count_asked(self, keys: Sequence[str], role: str) -> list[int]:
        """Count the calls with these keys; return the numbers of those that are to be answered, each key once."""
        counts, left = self._roles.setdefault(role, Counts()), {}
        for i, key in enumerate(keys):
            is_new = compact_key(key) not in self._asked
            self._asked.add(compact_key(key))
            counts.calls += is_new
            if key not in self.journal:
                left.setdefault(key, i)
            elif is_new:
                counts.cached += 1
                counts.spent.add(*self.journal.read_with_price(key))
        return list(left.values())

    def _answer(self, engine: Engine, calls: Mapping[str, Call], role: str, priced: bool, bar: tqdm[Any]) -> int:
        """Ask the engine until a limit is reached; return how many calls got a reply or failed.

        Args:
            calls: by key.
        """
        keys, counts, done = list(calls), self._roles[role], 0

        def on_reply(number: int, result: Reply | Failure) -> None:
            nonlocal done
            with self._lock:
                done += 1
                if isinstance(result, Reply):
                    self.journal.add(keys[number], role, priced, result)
                    self._failed.pop(keys[number], None)
                    self._spent.add(result, priced)
                    counts.spent.add(result, priced)
                else:
                    self._failed[keys[number]] = role, result
                self._retries.update(result.retries)
                bar.set_postfix_str(self._progress(), refresh=False)
                bar.update()
                if isinstance(result, Reply) and not result.tokens and self.budget.counts_tokens:
                    raise ValueError(f"{role}: replies come without a count of their tokens, which --max-tokens and "
                                     "--budget need; --max-calls does not")  # fmt: skip
                if self._has_too_many_failures or self.budget.reached(self._spent):
                    raise _Stop

        try:
            engine.answer(list(calls.values()), on_reply)
            assert done == len(calls), f"{done} of {len(calls)} calls were reported"
        except _Stop:
            pass
        return done

    def _progress(self) -> str:
        text = f"{self._spent.tokens:,} tokens"
        if self.budget.price is not None:
            text += f", cost {self.budget.cost(self._spent):.4g}"
        if self._failed:
            text += f", {len(self._failed):,} failed"
        return text if self.kept is None else f"{text}, {self.kept:,} kept"

    def _require_budget(self) -> None:
        """Stop where a limit of the budget is reached."""
        if reached := self.budget.reached(self._spent):
            raise BudgetSpent(
                f"the budget is spent: {reached} ({self._spent.calls:,} calls, {self._spent.tokens:,} tokens); all "
                f"replies are in {self.journal.path}, and the same command with a larger budget goes on"
            )

    @property
    def _has_too_many_failures(self) -> bool:
        return len(self._failed) > self.max_failed * len(self._asked)

    def _require_replies(self) -> None:
        """Stop where too many calls failed."""
        if self._has_too_many_failures:
            reason, number = self._reasons().most_common(1)[0]
            detail = next(failure.detail for _, failure in self._failed.values() if failure.reason == reason)
            raise TooManyFailed(
                f"{len(self._failed):,} of {len(self._asked):,} calls failed, more than --max-failed "
                f"{self.max_failed:g} allows; most often ({number:,}): {reason}{detail and ': '}{detail}; all "
                f"replies are in {self.journal.path}, and the same command asks the rest"
            )


class _Stop(Exception):
    """Ends `Engine.answer` at a limit."""
