"""Continuous batching over the slots of a static KV cache.

    feed -> prefill -> engine -> decoding -> outcomes
             |          |          |
  vision, pack_runner  pool    step_runner, sampling

`engine.py` is the loop. `feed.py` gathers a window of samples; `prefill.py` computes their prompts
in packs, with images encoded by `vision.py`; `pool.py` provides slots; `decoding.py` computes
steps until answers end. `memory.py` limits what one forward computes.

A row is a `WaitingRow` until its prompt is computed, then a `PrefilledRow`, and a `Row` while it
waits for a slot and is decoded. For readers of nano-vLLM: these three are its sequence,
`SlotEngine`, `Prefill` and `Decoding` its scheduler, `SlotPool` its block manager, and `Decoder`,
`PackRunner` and `StepRunner` its model runner.
"""
