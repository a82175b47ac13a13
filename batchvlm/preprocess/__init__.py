"""Prompts -> samples, in worker processes: decoded images, token ids, pixel values."""
