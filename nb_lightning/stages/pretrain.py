"""Pretraining: next-token cross-entropy under an FG-WSD plan (report, section "Training recipe").

Learning rate, mixture, context and RoPE base are moved by the callbacks `FGWSD`, `DataMixtureShift` and
`ContextExtension`; the loss is `NextTokenStage`'s.
"""

from nb_lightning.stages.next_token import NextTokenStage


class PretrainStage(NextTokenStage):
    """FG-WSD pretraining over packed rows of tokenized sources (data/pretrain.py)."""
