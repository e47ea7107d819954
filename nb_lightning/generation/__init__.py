"""Sampling from a model: the decoder, its cache of keys and values, the choice of the next token."""
