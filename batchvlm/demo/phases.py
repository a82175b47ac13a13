"""The two phases of training.

Phase A trains the vision tower to recognize the object in each cell (`cells`). Phase B trains the
whole model to answer questions (`packing`), with the loss of phase A added.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.nn.functional as F
from numpy.random import Generator
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer
from transformers import Idefics3ForConditionalGeneration, Idefics3Processor

from batchvlm.demo.cells import CellHead, CellLoss, cell_loss
from batchvlm.demo.packing import PackedBatch, Packer, draw_rows
from batchvlm.demo.pool import Pool, draw_images

# Shapes: I images, R rows, T tokens of a row, D hidden size, V visual tokens of an image,
# L labels of a batch, N vocabulary.

_WARM_UP: Final = 0.03
_FINAL_FACTOR: Final = 0.02
_WEIGHT_DECAY: Final = 0.05
_MAX_GRADIENT_NORM: Final = 1.0
# Learning rate of AdamW for parameters that Muon cannot train: vectors, embeddings, patch kernel.
_ADAMW_FACTOR: Final = 0.65
# Lower learning rate in phase B for the vision tower, which phase A has trained.
_VISION_FACTOR: Final = 0.25
_CELL_LOSS_FACTOR: Final = 0.3


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """All settings that determine the trained weights."""

    seed: int = 0
    """Seed of the images, the initial weights and all sampling."""

    num_images: int = 48_000
    """Images rendered once, before phase A."""

    num_steps_a: int = 600
    """Steps of phase A."""

    num_steps_b: int = 2_400
    """Steps of phase B."""

    images_per_step_a: int = 64
    """Images in a step of phase A."""

    images_per_step_b: int = 32
    """Images in a step of phase B, each with one row of questions."""

    pairs_per_step: int = 10
    """Additional rows in a step of phase B with two of the same images each."""

    learning_rate: float = 4e-3
    """Peak learning rate of the matrices of the language model, and of phase A."""


@dataclass(frozen=True, kw_only=True)
class Network:
    """The trained modules and the processor."""

    model: Idefics3ForConditionalGeneration
    head: CellHead
    processor: Idefics3Processor

    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Return every trained tensor with its name; those of the head start with "head."."""
        return [
            *self.model.named_parameters(),
            *((f"head.{name}", weight) for name, weight in self.head.named_parameters()),
        ]

    def vision_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Return the parameters of vision tower, connector and cell head."""
        parts = ("vision_model", "connector", "head.")
        return [(name, w) for name, w in self.parameters() if any(part in name for part in parts)]

    def see(self, pixels_ICHW: Tensor) -> Tensor:
        """Return the visual tokens [I, V, D] of images."""
        inner: Any = self.model.model
        features: Tensor = inner.vision_model(
            pixels_ICHW, patch_attention_mask=None
        ).last_hidden_state
        connected: Tensor = inner.connector(features)
        return connected


def train_vision(
    network: Network, pool: Pool, rng: Generator, cfg: TrainConfig
) -> Iterator[tuple[int, CellLoss]]:
    """Phase A: train vision tower and connector to recognize the object in each cell.

    Yields:
        The number and loss of each step.
    """
    named = network.vision_parameters()
    optimizers = _build_optimizers(named, cfg.learning_rate)
    for step in range(cfg.num_steps_a):
        _set_learning_rate(optimizers, step / cfg.num_steps_a)
        pixels_ICHW, scenes = draw_images(pool, cfg.images_per_step_a, rng)
        with torch.autocast("cpu", torch.bfloat16):
            result = cell_loss(network.head, network.see(pixels_ICHW), scenes)
        _step(result.loss, [weight for _, weight in named], optimizers)
        yield step, result


@dataclass(frozen=True, kw_only=True)
class AnswerLoss:
    """The losses and accuracy of one step of phase B."""

    answers: float
    """Weighted loss of the answers, in nats per token."""

    cells: CellLoss
    """Loss of the cell head."""

    is_right: list[tuple[str, bool]]
    """Kind of each answer, and whether every token was predicted, given the correct prefix."""


def train_answers(
    network: Network,
    pool: Pool,
    rng: Generator,
    cfg: TrainConfig,
    state: dict[str, Any] | None,
    checkpoint: Callable[[int, list[Optimizer]], None],
) -> Iterator[tuple[int, AnswerLoss]]:
    """Phase B: train the whole model to answer questions.

    Args:
        state: a saved state to continue from; None to start.
        checkpoint: called before each step with its number and the optimizers.

    Yields:
        The number and losses of each step.
    """
    named = network.parameters()
    vision_names = {name for name, _ in network.vision_parameters()}
    optimizers = [
        *_build_optimizers(
            [(name, w) for name, w in named if name in vision_names],
            cfg.learning_rate * _VISION_FACTOR,
        ),
        *_build_optimizers(
            [(name, w) for name, w in named if name not in vision_names], cfg.learning_rate
        ),
    ]
    first_step = 0
    if state is not None:
        first_step = state["step"]
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    packer = Packer(network.processor)
    for step in range(first_step, cfg.num_steps_b):
        checkpoint(step, optimizers)
        _set_learning_rate(optimizers, step / cfg.num_steps_b)
        pixels_ICHW, scenes = draw_images(pool, cfg.images_per_step_b, rng)
        batch = packer.pack(draw_rows(scenes, cfg.pairs_per_step, rng))
        with torch.autocast("cpu", torch.bfloat16):
            features_IVD = network.see(pixels_ICHW)
            cells = cell_loss(network.head, features_IVD, scenes)
            logits_LN = _answer_logits(network, batch, features_IVD, packer.image_id)
        is_label_RT = batch.labels_RT >= 0
        labels_L = batch.labels_RT[is_label_RT]
        weights_L = batch.weights_RT[is_label_RT]
        losses_L = F.cross_entropy(logits_LN.float(), labels_L, reduction="none")
        loss = (losses_L * weights_L).sum() / weights_L.sum()
        _step(loss + _CELL_LOSS_FACTOR * cells.loss, [w for _, w in named], optimizers)
        is_wrong_L = logits_LN.detach().argmax(-1) != labels_L
        turns_L = batch.turns_RT[is_label_RT]
        num_wrong = torch.bincount(turns_L, is_wrong_L.float(), len(batch.kinds))
        is_right = [
            (kind, wrong == 0) for kind, wrong in zip(batch.kinds, num_wrong.tolist(), strict=True)
        ]
        yield step, AnswerLoss(answers=loss.item(), cells=cells, is_right=is_right)


def _answer_logits(
    network: Network, batch: PackedBatch, features_IVD: Tensor, image_id: int
) -> Tensor:
    """Return the logits [L, N] at the positions with a label."""
    text_model: Any = network.model.model.text_model
    embedded_RTD = text_model.embed_tokens(batch.ids_RT)
    embedded_RTD = embedded_RTD.masked_scatter(
        (batch.ids_RT == image_id)[..., None], features_IVD[batch.images].to(embedded_RTD.dtype)
    )
    # Eager attention adds its mask to the scores, so the mask must be numeric.
    mask_R1TT = torch.zeros(batch.mask_R1TT.shape, dtype=torch.bfloat16)
    mask_R1TT.masked_fill_(~batch.mask_R1TT, -1e9)
    hidden_RTD = text_model(
        inputs_embeds=embedded_RTD,
        attention_mask=mask_R1TT,
        position_ids=batch.positions_RT,
        use_cache=False,
    ).last_hidden_state
    logits_LN: Tensor = network.model.lm_head(hidden_RTD[batch.labels_RT >= 0])
    return logits_LN


def _build_optimizers(
    named: Iterable[tuple[str, nn.Parameter]], learning_rate: float
) -> list[Optimizer]:
    """Return Muon for the matrices and AdamW for the other parameters."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, weight in named:
        is_matrix = weight.dim() == 2 and "embed" not in name and not name.startswith("head.")
        (matrices if is_matrix else others).append(weight)
    return [
        Muon(
            matrices,
            lr=learning_rate,
            weight_decay=_WEIGHT_DECAY,
            adjust_lr_fn="match_rms_adamw",
        ),
        AdamW(
            others,
            lr=learning_rate * _ADAMW_FACTOR,
            betas=(0.9, 0.98),
            weight_decay=0.0,
            fused=True,
        ),
    ]


def _set_learning_rate(optimizers: Iterable[Optimizer], progress: float) -> None:
    """Set the learning rate: linear warm-up, then cosine decay; `progress` is from 0 to 1."""
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    factor = min(1.0, progress / _WARM_UP) * (_FINAL_FACTOR + (1 - _FINAL_FACTOR) * cosine)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            peak = group.setdefault("peak_lr", group["lr"])
            group["lr"] = peak * factor


def _step(loss: Tensor, weights: list[nn.Parameter], optimizers: Iterable[Optimizer]) -> None:
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(weights, _MAX_GRADIENT_NORM)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
