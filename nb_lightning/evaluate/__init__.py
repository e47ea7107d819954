"""Evaluation of a model: accuracy on tasks, perplexity of text. Training does not import it."""
