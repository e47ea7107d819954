"""Sample text from the model in training at the end of every phase, into `samples.txt`."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl

from nb_lightning.files import write_text
from nb_lightning.generation.decoder import Sampling, generate
from nb_lightning.phase_callback import PhaseCallback, StageModule
from nb_lightning.phases import Phase
from nb_lightning.run_folder import SAMPLES


class TextSample(PhaseCallback):
    """Continues a prompt, with the same seed at each phase.

    Args:
        prompt: the text that the model continues.
        max_new_tokens: length of a sample.
        temperature: of the softmax; 0 is greedy.
    """

    def __init__(self, prompt: str, max_new_tokens: int = 200, temperature: float = 0.7) -> None:
        self.prompt, self.max_new_tokens, self.temperature = prompt, max_new_tokens, temperature

    def on_phase_end(self, trainer: pl.Trainer, module: StageModule, phase: Phase) -> None:
        tokenizer = module.data.tokenizer
        prompt = tokenizer.tokenizer.encode(self.prompt, add_special_tokens=False).ids
        sampling = Sampling(self.max_new_tokens, self.temperature, stop_ids=(tokenizer.eos_id,))
        # Every rank takes part: under FSDP a forward is a collective. With one seed they sample the same.
        (completion,) = generate(module.model, [prompt], sampling, seeds=0)
        if trainer.is_global_zero:
            path = Path(trainer.default_root_dir) / SAMPLES
            title = f"=== end of {phase.name}, {module.tokens_seen:,} tokens ==="
            # A run that was killed may reach the end of a phase again.
            earlier = path.read_text(encoding="utf-8").partition(title)[0] if path.is_file() else ""
            text = tokenizer.decode([id for id in completion.ids if id != tokenizer.eos_id])
            write_text(path, f"{earlier}{title}\n{self.prompt}{text}\n\n")
