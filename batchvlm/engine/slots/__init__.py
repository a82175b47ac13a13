"""Continuous batching over the slots of a static KV cache.

    feed -> prefill -> engine -> decoding -> outcomes
             |          |          |
           vision      pool     step_runner, sampling

`engine.py` is the loop. `feed.py` gathers a window of samples; `prefill.py` computes their prompts
in packs, with images encoded by `vision.py`; `pool.py` provides slots; `decoding.py` computes
steps until answers end. `memory.py` limits what one forward computes.
"""
