"""Verifiers: they score completions.

    verifier = get_verifier("math")
    scores = verifier.score(prompt, completions, reference)     # one Score per completion, in order

A verifier that raises, hangs or is killed gives rewards of 0 and a status; the run goes on. docs/rewards.md lists the
reference format of each verifier.
"""

from nb_lightning.rewards.registry import get_verifier
from nb_lightning.rewards.verifier import Guarded, Score, Verifier, statuses

__all__ = ["Guarded", "Score", "Verifier", "get_verifier", "statuses"]
