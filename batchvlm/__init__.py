"""Run a vision-language model over a whole dataset."""

__version__ = "0.1.0"
