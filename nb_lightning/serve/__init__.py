"""An OpenAI-compatible server on LitServe: `python -m nb_lightning.serve --model PATH` (docs/serving.md).

Two processes beside LitServe's own: `engine` decodes in its worker, `routes` answers HTTP; only token ids and their
log-probabilities go between them. `protocol` is what requests may say, `text` makes text of tokens.
"""
