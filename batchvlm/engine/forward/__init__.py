"""One forward of a transformers model for the slot engine, and what makes it fast.

`decoder.py` runs packed prompts and decode steps in the layouts of `layout.py`; `attention.py`
attends in them, and `cache.py` stores their keys and values. The other modules are faster ways to
compute the same, which are compared with the model's own way or timed against it before use.
"""
