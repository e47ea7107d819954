"""An OpenAI-compatible server on LitServe: `python -m nb_lightning.serve --model PATH` (docs/serving.md).

Two processes beside LitServe's queue: `engine` decodes in LitServe's worker, `routes` answers HTTP. Only token ids and
their log-probabilities pass between them. `protocol` has the requests, `text_stream` turns tokens into text, `replies`
has the responses.
"""
