"""The embedded demo: a corpus of real text in quality grades from what comes with Python, and tasks with answers."""

from data.demo.corpus import build_demo_corpus
from data.demo.tasks import build_demo_tasks

__all__ = ["build_demo_corpus", "build_demo_tasks"]
