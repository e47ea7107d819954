"""The embedded demo corpus: real text in quality grades from what comes with Python, and worked sums."""

from data.demo.corpus import build_demo_corpus

__all__ = ["build_demo_corpus"]
