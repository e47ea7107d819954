"""Build the embedded demo: a corpus of text in quality grades from the Python installation, and tasks with answers."""

from data.demo.corpus import build_demo_corpus
from data.demo.tasks import build_demo_tasks

__all__ = ["build_demo_corpus", "build_demo_tasks"]
