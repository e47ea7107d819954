"""Text from the model in training: a few lines at the end of every phase, in `samples.txt`."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl

from nb_lightning.files import write_text
from nb_lightning.generation.decoder import Sampling, generate
from nb_lightning.phase_callback import PhaseCallback
from nb_lightning.phases import Phase


class TextSample(PhaseCallback):
    """Args:
    prompt: what the model goes on from.
    max_new_tokens: length of each sample.
    temperature: of the softmax; 0 is greedy.
    """

    def __init__(self, prompt: str, max_new_tokens: int = 200, temperature: float = 0.7) -> None:
        self.prompt, self.max_new_tokens, self.temperature = prompt, max_new_tokens, temperature

    def on_phase_end(self, trainer: pl.Trainer, module: pl.LightningModule, phase: Phase) -> None:
        tokenizer = module.data.tokenizer
        prompt = tokenizer.tokenizer.encode(self.prompt, add_special_tokens=False).ids
        sampling = Sampling(self.max_new_tokens, self.temperature, stop_ids=(tokenizer.eos_id,))
        # Every rank takes part: under FSDP a forward is a collective. The seed makes them agree.
        (completion,) = generate(module.model, [prompt], sampling, seeds=0)
        if trainer.is_global_zero:
            path = Path(trainer.default_root_dir) / "samples.txt"
            title = f"=== end of {phase.name}, {module.tokens_seen:,} tokens ==="
            # A run that was killed comes to the end of a phase again.
            before = path.read_text(encoding="utf-8").partition(title)[0] if path.is_file() else ""
            text = tokenizer.decode([id for id in completion.ids if id != tokenizer.eos_id])
            write_text(path, f"{before}{title}\n{self.prompt}{text}\n\n")
