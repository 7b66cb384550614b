"""The experiments of `scripts/learn.py`: their tasks and their tables."""
