"""Preference pairs: sampled from teacher and student and judged (`python -m data.pairs`), and what is made of them."""
