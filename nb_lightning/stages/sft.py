"""SFT: next-token cross-entropy on what the assistant wrote (report, section on supervised fine-tuning).

A cold start on reasoning, then all kinds at a longer context: a plan of two phases, moved by the same callbacks as
pretraining's. What is trained on is the labels' to say (data/bin_packing.py); the loss is `NextTokenStage`'s.
"""

from nb_lightning.stages.next_token import NextTokenStage


class SFTStage(NextTokenStage):
    """Fine-tuning on packed rows of conversations (data/sft.py)."""
