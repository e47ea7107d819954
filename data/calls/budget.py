"""What calls may cost: limits on calls, tokens and money, and what was spent of them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import inf

from data.calls.call import Reply

MILLION = 1_000_000


class BudgetSpent(ValueError):
    """A limit of the budget is reached. The replies so far are in the journal."""


@dataclass(frozen=True)
class Budget:
    """Limits on all calls of a folder, earlier runs included; None is no limit.

    Attributes:
        calls: replies.
        tokens: of prompts and completions.
        money: in the currency of `price`.
        price: of a million tokens of prompts, and of completions, at an endpoint. Models on this machine cost nothing.

    Raises:
        ValueError: names the flag whose value cannot be.
    """

    calls: int | None = None
    tokens: int | None = None
    money: float | None = None
    price: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        for flag, limit in (("max-calls", self.calls), ("max-tokens", self.tokens), ("budget", self.money)):
            if limit is not None and not 0 < limit < inf:
                raise ValueError(f"--{flag} is {limit}; it must be a number above 0")
        if self.price is not None and not all(0 <= price < inf for price in self.price):
            raise ValueError(f"--price is {self.price[0]},{self.price[1]}; a price must not be negative")
        if self.money is not None and not any(self.price or ()):
            raise ValueError("--budget needs --price IN,OUT: what a million tokens of prompts and of completions cost")

    @property
    def counts_tokens(self) -> bool:
        """Whether a limit depends on the replies' tokens."""
        return self.tokens is not None or self.money is not None

    def cost(self, spent: Spent) -> float:
        """Return what replies cost."""
        price_in, price_out = self.price or (0.0, 0.0)
        return (spent.priced_prompt_tokens * price_in + spent.priced_completion_tokens * price_out) / MILLION

    def calls_left(self, spent: Spent) -> int | None:
        """Return how many calls may still be made; None is any number."""
        return None if self.calls is None else max(0, self.calls - spent.calls)

    def reached(self, spent: Spent) -> str:
        """Say which limit is reached; "" if none is."""
        if self.calls is not None and spent.calls >= self.calls:
            return f"{spent.calls:,} calls of --max-calls {self.calls:,}"
        if self.tokens is not None and spent.tokens >= self.tokens:
            return f"{spent.tokens:,} tokens of --max-tokens {self.tokens:,}"
        if self.money is not None and self.cost(spent) >= self.money:
            return f"{self.cost(spent):.4g} of --budget {self.money:g}"
        return ""


@dataclass
class Spent:
    """Counts of replies and their tokens; "priced" ones came from an endpoint."""

    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    priced_prompt_tokens: int = 0
    priced_completion_tokens: int = 0

    def add(self, reply: Reply, priced: bool) -> None:
        self.calls += 1
        self.prompt_tokens += reply.prompt_tokens
        self.completion_tokens += reply.completion_tokens
        if priced:
            self.priced_prompt_tokens += reply.prompt_tokens
            self.priced_completion_tokens += reply.completion_tokens

    def __add__(self, other: Spent) -> Spent:
        return Spent(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Spent)))

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens
