"""Sampling from the backbone, for a look at a model in training: every step runs the whole prefix again."""

from __future__ import annotations

import torch
from torch import Tensor

from nb_lightning.model import Transformer


@torch.no_grad()
def sample(
    model: Transformer, input_ids: Tensor, max_new_tokens: int, temperature: float, eos_id: int, seed: int
) -> Tensor:
    """Continue prompts of equal length.

    Args:
        input_ids: [B, T] int64.
        temperature: of the softmax; 0 takes the most likely token.
        eos_id: a row that drew it repeats it to the end.
        seed: of the draws, the same on every rank.

    Returns:
        [B, max_new_tokens] int64.
    """
    training = model.training
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    rows = input_ids
    done = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
    for _ in range(max_new_tokens):
        logits = model(rows, head=lambda hidden, weight: hidden[:, -1] @ weight.T).float()
        if temperature > 0:
            probs = torch.softmax(logits / temperature, dim=-1).cpu()
            token = torch.multinomial(probs, 1, generator=generator).squeeze(1).to(rows.device)
        else:
            token = logits.argmax(dim=-1)
        token = torch.where(done, eos_id, token)
        done |= token == eos_id
        rows = torch.cat((rows, token.unsqueeze(1)), dim=1)
    model.train(training)
    return rows[:, input_ids.shape[1] :]
