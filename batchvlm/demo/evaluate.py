"""Measure a model on the held-out set: `python -m batchvlm.demo.evaluate MODEL_DIR`.

It uses transformers without batchvlm's engine, so that it can serve as a reference for the engine:
greedy decoding in float32, in left-padded batches that mix prompts with one and two images.
"""

import argparse
import io
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from batchvlm.demo.questions import KINDS, LONG_KINDS, HeldOutItem, held_out

MAX_NEW_TOKENS: Final = 128


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Answers to held-out questions."""

    items: list[HeldOutItem]
    """The questions."""

    answers: list[str]
    """The model's answers."""

    duration_s: float
    """Seconds of preprocessing and generation, without loading."""

    num_same_alone: int | None
    """Answers that were the same in a batch of one; None if that was not measured."""

    def kinds(self) -> dict[str, dict[str, float | int]]:
        """Return exact match and number of items for each kind."""
        is_right: dict[str, list[bool]] = defaultdict(list)
        for item, answer in zip(self.items, self.answers, strict=True):
            is_right[item.kind].append(answer == item.answer)
        return {
            kind: {"exact_match": round(float(np.mean(hits)), 4), "num_items": len(hits)}
            for kind in KINDS
            if (hits := is_right[kind])
        }

    def vqa_mean(self) -> float:
        """Return the mean of exact match over the short kinds, including two-image kinds."""
        scores = [s["exact_match"] for kind, s in self.kinds().items() if kind not in LONG_KINDS]
        return float(np.mean(scores))

    def table(self) -> str:
        """Return the scores as text."""
        lines = [f"{'kind':12} {'exact':>6} {'items':>6}"]
        for kind, score in self.kinds().items():
            lines.append(f"{kind:12} {score['exact_match']:6.3f} {score['num_items']:6}")
        lines.append(f"{'VQA mean':12} {self.vqa_mean():6.3f}")
        rate = len(self.items) / self.duration_s
        lines.append(f"{len(self.items)} prompts in {self.duration_s:.0f} s, {rate:.0f} prompts/s")
        if self.num_same_alone is not None:
            lines.append(f"same in a batch of one: {self.num_same_alone} of {len(self.items)}")
        return "\n".join(lines)


class Answerer:
    """A model and its processor; answers batches greedily."""

    def __init__(self, model_dir: Path) -> None:
        # Any, because their methods have no types.
        auto_processor: Any = AutoProcessor
        auto_model: Any = AutoModelForImageTextToText
        self.processor = auto_processor.from_pretrained(model_dir)
        self.model = auto_model.from_pretrained(model_dir, dtype=torch.float32).eval()

    @torch.inference_mode()
    def answer(self, items: Sequence[HeldOutItem]) -> list[str]:
        """Answer one left-padded batch."""
        conversations = []
        for item in items:
            images = [Image.open(io.BytesIO(encoded)).convert("RGB") for encoded in item.images]
            content = [{"type": "image", "image": image} for image in images]
            content.append({"type": "text", "text": item.question})
            conversations.append([{"role": "user", "content": content}])
        inputs = self.processor.apply_chat_template(
            conversations,
            tokenize=True,
            return_dict=True,
            add_generation_prompt=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        )
        ids_BT = self.model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        answers: list[str] = self.processor.batch_decode(
            ids_BT[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        return answers


def evaluate(
    model_dir: Path,
    *,
    num_scenes: int = 500,
    batch_size: int = 16,
    seed: int = 0,
    is_compared_alone: bool = False,
) -> Scores:
    """Answer the held-out set in shuffled batches.

    Args:
        num_scenes: number of held-out scenes, with about twelve questions each.
        batch_size: prompts in a batch.
        seed: seed of the held-out set.
        is_compared_alone: whether to answer each question also in a batch of one.
    """
    items = held_out(num_scenes, seed)
    answerer = Answerer(model_dir)
    answers = [""] * len(items)
    started = time.monotonic()
    # Shuffled, so that long and short prompts with one and two images are padded together.
    order = np.random.default_rng(0).permutation(len(items)).tolist()
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        batch = answerer.answer([items[i] for i in indices])
        for i, answer in zip(indices, batch, strict=True):
            answers[i] = answer
    duration_s = time.monotonic() - started
    num_same_alone = None
    if is_compared_alone:
        num_same_alone = sum(
            answerer.answer([item]) == [answer] for item, answer in zip(items, answers, strict=True)
        )
    return Scores(
        items=items, answers=answers, duration_s=duration_s, num_same_alone=num_same_alone
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0, help="of the held-out set")
    parser.add_argument("--compare-alone", action="store_true", help="repeat in batches of one")
    parser.add_argument("--num-threads", type=int, default=2, help="of torch")
    parser.add_argument("--show-errors", type=int, default=0, help="print this many wrong answers")
    args = parser.parse_args()
    torch.set_num_threads(args.num_threads)
    scores = evaluate(
        args.model_dir,
        num_scenes=args.scenes,
        batch_size=args.batch_size,
        seed=args.seed,
        is_compared_alone=args.compare_alone,
    )
    print(scores.table())
    wrong = [
        (item, answer)
        for item, answer in zip(scores.items, scores.answers, strict=True)
        if item.answer != answer
    ]
    for item, answer in wrong[: args.show_errors]:
        print(f"{item.scene_index} {item.kind}: {item.question} {item.answer!r}, said {answer!r}")


if __name__ == "__main__":
    main()
