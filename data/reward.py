"""Data of the reward model: each preference pair (data.prepare --pairs) becomes two comparisons.

The chosen response comes first in one and second in the other, so that the order tells nothing. Only the right answer
is trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from data.bin_packing import Packing, pack_samples
from data.packed import PackedData, PackedSource
from data.preference import require_pairs
from data.sft import assemble_conversations
from nb_lightning.config.schema import ChatDataConfig, Config
from nb_lightning.phases import PhasePlan
from nb_lightning.rewards.comparison_form import ComparisonForm, comparison
from nb_lightning.text.chat_tokens import ChatTokenizer
from nb_lightning.token_source import TRAINED, Source


class ComparisonSource(PackedSource):
    """The comparisons of a source of pairs.

    Comparison 2 p has the chosen response of pair p first, comparison 2 p + 1 second.

    Args:
        answers: token ids of the answers "first" and "second".
    """

    unit = "comparisons"

    def __init__(self, name: str, source: Source, seq_lens: Sequence[int], seed: int, answers: tuple[int, int]) -> None:
        super().__init__(name, source, seq_lens, "drop", seed)
        self.answers = answers

    def _pack(self, samples: np.ndarray, seq_len: int, over_long: str) -> Packing:
        tokens = samples[:, 0].reshape(-1, 2).sum(1).repeat(2)
        return pack_samples(np.stack([tokens + 1, tokens], axis=1), seq_len, over_long, self.seed)

    def row(self, nth: int, seq_len: int) -> list[np.ndarray]:
        """Build the marked tokens of the comparisons in a row."""
        comparisons = self.packings[seq_len].pieces.sample[self.pieces_in_row(nth, seq_len)]
        return [self.comparison(int(number)) for number in comparisons]

    def comparison(self, number: int) -> np.ndarray:
        """Build the marked tokens of a comparison: two responses, each after its prompt, and the answer."""
        pair, right = divmod(number, 2)
        first, second = ((self.read(2 * pair + side) % TRAINED).tolist() for side in (right, 1 - right))
        return np.array([*comparison(first, second), self.answers[right] | TRAINED])


class RewardData(PackedData[ChatDataConfig]):
    """Sources of pairs, read as comparisons.

    Attributes:
        form: how a comparison is written.
    """

    def __init__(self, cfg: Config, plan: PhasePlan) -> None:
        super().__init__(cfg, plan)
        self.form = ComparisonForm.of(ChatTokenizer(self.tokenizer, self.chat))
        self.assemble = partial(assemble_conversations, pad_id=self.tokenizer.eos_id)

    def require_usable(self, key: str, source: Source, split: str) -> None:
        require_pairs(key, source)
        super().require_usable(key, source, split)

    def pack_source(self, name: str, source: Source, seq_lens: Sequence[int]) -> ComparisonSource:
        return ComparisonSource(name, source, seq_lens, self.cfg.seed, self.form.answers)
