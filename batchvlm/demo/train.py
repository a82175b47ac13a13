"""Train the demo model from scratch: `python -m batchvlm.demo.train --output DIR --seed 0`.

The length of both phases (`phases`) is a number of steps, not a time, so the seed and the numbers
of steps determine the result on any machine.

Training takes about 45 minutes on two cores with bfloat16 instructions. With glibc,
`MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000` keeps freed memory for the next step: this
takes a third less time, but up to 16 GB of memory.
"""

import argparse
import copy
import json
import sys
import time
from collections import defaultdict
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from torch.optim import Optimizer

from batchvlm.demo import evaluate
from batchvlm.demo.cells import CellHead, CellLoss
from batchvlm.demo.model import build_model, build_processor
from batchvlm.demo.phases import Network, TrainConfig, train_answers, train_vision
from batchvlm.demo.pool import build_pool
from batchvlm.demo.questions import KINDS, TRAINING_STREAM


def save_pretrained(network: Network, directory: Path) -> None:
    """Save the model as bfloat16 safetensors, with processor and tokenizer."""
    model: Any = copy.deepcopy(network.model)
    model.set_attn_implementation("sdpa")
    model.to(torch.bfloat16).save_pretrained(directory)
    network.processor.save_pretrained(directory)


def train(
    cfg: TrainConfig,
    output: Path,
    *,
    is_resumed: bool = False,
    checkpoint_every: int = 300,
    log_every: int = 20,
    num_eval_scenes: int = 500,
) -> dict[str, Any]:
    """Train, save the model to `output` and return the content of `output/training.json`.

    Args:
        output: folder for the model and for `checkpoint`.
        is_resumed: continue from `output/checkpoint`; the result is that of an uninterrupted run.
        checkpoint_every: steps of phase B between checkpoints.
        log_every: steps between progress lines.
        num_eval_scenes: number of held-out scenes for the final evaluation.
    """
    started = time.monotonic()
    rng = np.random.default_rng([TRAINING_STREAM, cfg.seed, 2])
    processor = build_processor()
    model = build_model(processor, seed=cfg.seed)
    # The backward pass of PyTorch's SDPA is slow on CPU.
    model.set_attn_implementation("eager")
    network = Network(model=model, head=CellHead(), processor=processor)
    pool = build_pool(cfg.num_images, cfg.seed)
    _log(started, f"{len(pool.scenes)} pictures, {model.num_parameters():,} parameters")

    state_path = output / "checkpoint" / "state.pt"
    state: dict[str, Any] | None = None
    if is_resumed:
        state = _load_state(state_path, network, rng)
        started -= state["duration_s"]
    else:
        for step, seen in train_vision(network, pool, rng, cfg):
            if step % log_every == 0 or step == cfg.num_steps_a - 1:
                _log(started, f"A {step} loss {seen.loss.item():.3f} {_cells_text(seen)}")

    def checkpoint(step: int, optimizers: list[Optimizer]) -> None:
        if step % checkpoint_every == 0 and (state is None or step > state["step"]):
            save_pretrained(network, state_path.parent)
            progress = {"step": step, "duration_s": time.monotonic() - started}
            _save_state(state_path, network, optimizers, rng, progress)

    window: dict[str, list[bool]] = defaultdict(list)
    rates: dict[str, float] = {}
    for step, learned in train_answers(network, pool, rng, cfg, state, checkpoint):
        for kind, is_right in learned.is_right:
            window[kind].append(is_right)
        if (step + 1) % log_every == 0 or step == cfg.num_steps_b - 1:
            rates = {kind: round(float(np.mean(window[kind])), 3) for kind in KINDS if window[kind]}
            window.clear()
            rates_text = " ".join(f"{kind} {rate}" for kind, rate in rates.items())
            _log(
                started,
                f"B {step} loss {learned.answers:.4f} {_cells_text(learned.cells)} | {rates_text}",
            )

    save_pretrained(network, output)
    report = {
        "command": f"python -m batchvlm.demo.train {' '.join(sys.argv[1:])}",
        "config": asdict(cfg),
        "num_parameters": model.num_parameters(),
        "num_threads": torch.get_num_threads(),
        "duration_s": round(time.monotonic() - started),
        "versions": {
            name: version(name)
            for name in ("torch", "transformers", "tokenizers", "numpy", "pillow")
        },
        "last_training_accuracy": rates,
    }
    if num_eval_scenes:
        scores = evaluate.evaluate(output, num_scenes=num_eval_scenes)
        report["held_out"] = {"num_scenes": num_eval_scenes, "kinds": scores.kinds()}
        _log(started, scores.table())
    (output / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


def _save_state(
    path: Path,
    network: Network,
    optimizers: list[Optimizer],
    rng: Generator,
    progress: dict[str, Any],
) -> None:
    """Save everything that later steps depend on."""
    state = {
        **progress,
        "model": network.model.state_dict(),
        "head": network.head.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "rng": json.dumps(rng.bit_generator.state),
    }
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def _load_state(path: Path, network: Network, rng: Generator) -> dict[str, Any]:
    """Load a saved state into network and generator; phase B loads that of the optimizers."""
    state: dict[str, Any] = torch.load(path, weights_only=True)
    network.model.load_state_dict(state["model"])
    network.head.load_state_dict(state["head"])
    rng.bit_generator.state = json.loads(state["rng"])
    return state


def _cells_text(seen: CellLoss) -> str:
    return (
        f"images {seen.images:.2f} shape {seen.shape:.3f} color {seen.color:.3f} "
        f"size {seen.size:.3f}"
    )


def _log(started: float, message: str) -> None:
    print(f"[{time.monotonic() - started:6.0f}s] {message}", flush=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    default = TrainConfig()
    parser.add_argument("--output", type=Path, required=True, help="folder for the model")
    for name in ("seed", "num_images", "num_steps_a", "num_steps_b"):
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=int, default=getattr(default, name))
    parser.add_argument("--num-threads", type=int, default=2, help="of torch")
    parser.add_argument("--num-eval-scenes", type=int, default=500, help="0 skips evaluation")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint")
    args = parser.parse_args()
    torch.set_num_threads(args.num_threads)
    cfg = TrainConfig(
        seed=args.seed,
        num_images=args.num_images,
        num_steps_a=args.num_steps_a,
        num_steps_b=args.num_steps_b,
    )
    train(cfg, args.output, is_resumed=args.resume, num_eval_scenes=args.num_eval_scenes)


if __name__ == "__main__":
    main()
