"""SFT data: packed rows of conversations. Only the assistant's tokens are trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from data.bin_packing import OVER_LONG, assemble_batch
from data.packed import PackedData, PackedSource
from nb_lightning.batch import PackedBatch
from nb_lightning.config.schema import Config, SFTDataConfig
from nb_lightning.phases import PhasePlan
from nb_lightning.token_source import Source


class SFTData(PackedData[SFTDataConfig]):
    """Sources of conversations."""

    def __init__(self, cfg: Config, plan: PhasePlan) -> None:
        super().__init__(cfg, plan)
        if self.settings.over_long not in OVER_LONG:
            raise ValueError(f"data.over_long is {self.settings.over_long!r}; allowed: {', '.join(OVER_LONG)}")
        self.assemble = partial(assemble_conversations, pad_id=self.tokenizer.eos_id)

    def build_demo(self) -> None:
        if self.settings.demo_tasks:
            from data.demo.chats import build_demo_chats

            build_demo_chats(
                Path(self.cfg.paths.data_root) / "demo_tasks",
                {name: Path(path) for name, path in self.source_folders.items()},
                self.settings.tokenizer,
                self.chat.source,
            )

    def require_usable(self, key: str, source: Source, split: str) -> None:
        if not source.manifest.is_chat:
            raise ValueError(f"{key}: {source.folder} holds documents; data.prepare --chat makes conversations")
        if source.manifest.pairs:
            raise ValueError(f"{key}: {source.folder} holds preference pairs (stage=dpd), not conversations")
        super().require_usable(key, source, split)

    def pack_source(self, name: str, source: Source, seq_lens: Sequence[int]) -> PackedSource:
        return PackedSource(name, source, seq_lens, self.settings.over_long, self.cfg.seed)

    @property
    def digests(self) -> dict[str, str]:
        """Hash of each source's training data and of `over_long`, which changes the rows too."""
        texts = {name: f"{self.settings.over_long} {digest}" for name, digest in super().digests.items()}
        return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}


def assemble_conversations(rows: Sequence[tuple[PackedSource, int]], seq_len: int, pad_id: int) -> PackedBatch:
    """Assemble (source, nth row of its stream) into one batch."""
    return assemble_batch([source.row(nth, seq_len) for source, nth in rows], seq_len, pad_id)
