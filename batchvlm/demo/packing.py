"""Training rows: an image prefix and many independent conversations about it.

A row starts with the image tokens; each conversation after them is a segment. A block mask lets a
segment attend to the prefix and itself, and positions restart after the prefix, so segments do not
affect each other. One pass over the image thus serves about eight questions.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import torch
from numpy.random import Generator
from torch import Tensor
from transformers import Idefics3Processor

from batchvlm.demo import questions
from batchvlm.demo.model import END, FAKE, GLOBAL, IMAGE, NUM_IMAGE_TOKENS, START
from batchvlm.demo.questions import LONG_KINDS, Question
from batchvlm.demo.world import Scene

# Shapes: R rows, T tokens of a row.

ROW_LENGTH: Final = 256
IGNORED: Final = -100
_USER: Final = f"{START}user\n"
_ASSISTANT: Final = f"{END}\n{START}assistant\n"
_NEXT_USER: Final = f"\n{_USER}"
_ONE_IMAGE: Final = f"{FAKE}{GLOBAL}{IMAGE * NUM_IMAGE_TOKENS}{FAKE}"

# Kinds that are hard for a small model are listed twice.
_ASKED: Final = (*questions.VQA_KINDS, "where", "count_x", "exists")
_P_LONG: Final = {"caption": 0.5, "json": 0.55}
_P_FOLLOW_UP: Final = 0.15
_P_WHICH: Final = 0.65
_QUESTIONS_PER_PAIR: Final = 10
# Each token of a short answer depends on the image; most tokens of a caption do not.
_VQA_WEIGHT: Final = 3.0


@dataclass(frozen=True, kw_only=True)
class Row:
    """The images and questions of one row."""

    images: tuple[int, ...]
    """Indices in the batch of the images of its prefix."""

    conversations: list[list[Question]]
    """Turns of each conversation; conversations that do not fit into the row are left out."""


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """Rows as tensors."""

    ids_RT: Tensor
    """int64 [R, T] token ids."""

    positions_RT: Tensor
    """int64 [R, T], restarting after the prefix with each segment."""

    mask_R1TT: Tensor
    """bool [R, 1, T, T], True where a token (third axis) may attend to another (fourth)."""

    labels_RT: Tensor
    """int64 [R, T], the next token if it is part of an answer, else -100."""

    weights_RT: Tensor
    """float32 [R, T], weight of each label in the loss."""

    turns_RT: Tensor
    """int64 [R, T], index of the answer in the batch that a label is part of, else -1."""

    kinds: list[str]
    """Kind of each answer in the batch."""

    images: list[int]
    """Index of the image in each prefix slot, in row order."""


def draw_rows(scenes: Sequence[Scene], num_pairs: int, rng: Generator) -> list[Row]:
    """Draw questions: one row for each scene and `num_pairs` rows for two scenes each."""
    rows = []
    for index, scene in enumerate(scenes):
        kinds = [kind for kind in LONG_KINDS if rng.random() < _P_LONG[kind]]
        kinds += rng.permutation(_ASKED).tolist()
        conversations: list[list[Question]] = []
        for kind in kinds:
            question = questions.ask(scene, kind, rng)
            if question is None:
                continue
            if conversations and rng.random() < _P_FOLLOW_UP:
                conversations[-1].append(question)
            else:
                conversations.append([question])
        rows.append(Row(images=(index,), conversations=conversations))
    for _ in range(num_pairs):
        first, second = rng.choice(len(scenes), 2, replace=False).tolist()
        conversations = []
        for _ in range(_QUESTIONS_PER_PAIR):
            kind = "which" if rng.random() < _P_WHICH else "more"
            conversations.append([questions.ask_pair(scenes[first], scenes[second], kind, rng)])
        rows.append(Row(images=(first, second), conversations=conversations))
    return rows


class Packer:
    """Turns rows into tensors with the processor's own tokens."""

    def __init__(self, processor: Idefics3Processor) -> None:
        tokenizer: Any = processor.tokenizer
        # Pieces can be tokenized separately because special tokens are between them.
        self.encode = cache(
            lambda text: tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
        )
        self.image_id: int = tokenizer.convert_tokens_to_ids(IMAGE)

    def prefix(self, num_images: int) -> list[int]:
        """Return the token ids of everything before the question."""
        return [*self.encode(_USER), *self.encode(_ONE_IMAGE) * num_images]

    def conversation(self, turns: Iterable[Question]) -> list[tuple[int, int]]:
        """Return the token ids after the prefix, each with the turn of its answer or -1."""
        tokens: list[tuple[int, int]] = []
        for turn, question in enumerate(turns):
            text = (_NEXT_USER if turn else "") + question.text
            tokens += [(i, -1) for i in (*self.encode(text), *self.encode(_ASSISTANT))]
            tokens += [(i, turn) for i in (*self.encode(question.answer), *self.encode(END))]
        return tokens

    def pack(self, rows: Sequence[Row]) -> PackedBatch:
        """Pack rows into rectangles of `ROW_LENGTH` tokens."""
        shape = (len(rows), ROW_LENGTH)
        ids_RT = torch.zeros(shape, dtype=torch.long)
        positions_RT = torch.zeros(shape, dtype=torch.long)
        segments_RT = torch.full(shape, -1)
        labels_RT = torch.full(shape, IGNORED)
        weights_RT = torch.zeros(shape)
        turns_RT = torch.full(shape, -1)
        kinds: list[str] = []
        for r, row in enumerate(rows):
            prefix = self.prefix(len(row.images))
            end = num_prefix = len(prefix)
            ids_RT[r, :end] = torch.tensor(prefix)
            positions_RT[r, :end] = torch.arange(end)
            segments_RT[r, :end] = 0
            for segment, turns in enumerate(row.conversations, start=1):
                tokens = self.conversation(turns)
                start, length = end, len(tokens)
                if start + length > ROW_LENGTH:
                    continue
                end += length
                ids_RT[r, start:end] = torch.tensor([token for token, _ in tokens])
                positions_RT[r, start:end] = torch.arange(num_prefix, num_prefix + length)
                segments_RT[r, start:end] = segment
                # Shifted to the left by one, because each token is predicted at the one before it.
                # This overwrites only the last token of the previous segment, which has no label.
                answer = slice(start - 1, end - 1)
                labels_RT[r, answer] = torch.tensor(
                    [i if turn >= 0 else IGNORED for i, turn in tokens]
                )
                weights_RT[r, answer] = torch.tensor([_weight(turns, turn) for _, turn in tokens])
                turns_RT[r, answer] = torch.tensor(
                    [len(kinds) + turn if turn >= 0 else -1 for _, turn in tokens]
                )
                kinds += [question.kind for question in turns]
        return PackedBatch(
            ids_RT=ids_RT,
            positions_RT=positions_RT,
            mask_R1TT=_block_mask(segments_RT)[:, None],
            labels_RT=labels_RT,
            weights_RT=weights_RT,
            turns_RT=turns_RT,
            kinds=kinds,
            images=[image for row in rows for image in row.images],
        )


def _weight(turns: Sequence[Question], turn: int) -> float:
    if turn < 0:
        return 0.0
    return 1.0 if turns[turn].kind in LONG_KINDS else _VQA_WEIGHT


def _block_mask(segments_RT: Tensor) -> Tensor:
    """Return a causal mask, bool [R, T, T], to the prefix (segment 0) and a token's own segment."""
    length = segments_RT.shape[1]
    causal_TT = torch.ones(length, length, dtype=torch.bool).tril()
    queries, keys = segments_RT[:, :, None], segments_RT[:, None, :]
    # Padding attends to itself and other padding, so no row of the softmax is empty.
    return causal_TT & ((queries == keys) | (keys == 0))
