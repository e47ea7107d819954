"""Prepare tokenized sources from raw records (`python -m data.prepare`)."""
