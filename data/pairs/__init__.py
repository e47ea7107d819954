"""Make preference pairs: sample teacher and student, score, choose (`python -m data.pairs`)."""
