"""An auxiliary head that trains the vision tower before the language model; discarded afterwards.

From every visual token it predicts the object in the token's cell of the 3x3 grid and the cell's
index. From answers alone, a model this small would take far longer to learn to use images.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchvlm.demo.model import HIDDEN_SIZE
from batchvlm.demo.world import COLOR_NAMES, NUM_CELLS, SHAPES, SIZES, Scene

# Shapes: I images, V visual tokens (36, a 6x6 grid), D hidden size, G cells (9), K visual
# tokens of a cell (4), N classes.

_NUM_CLASSES: Final = (len(SHAPES) + 1, len(COLOR_NAMES), len(SIZES), NUM_CELLS)
_LOSS_WEIGHTS: Final = (1.0, 0.7, 0.4, 0.4)
# Most cells are empty; without a lower weight the head would learn to predict only that.
_EMPTY_WEIGHT: Final = 0.3
_IGNORED: Final = -100


class CellHead(nn.Module):
    """Predicts shape (0 for none), color, size and cell index from each visual token."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN_SIZE)
        self.linear = nn.Linear(HIDDEN_SIZE, sum(_NUM_CLASSES))

    def forward(self, features_IVD: Tensor) -> tuple[Tensor, ...]:
        """Return four tensors of logits [I, G, K, N] from connector outputs [I, 36, D]."""
        cells_IGKD = gather_cells(self.norm(features_IVD))
        return torch.split(self.linear(cells_IGKD), list(_NUM_CLASSES), dim=-1)


def gather_cells(tokens_IVD: Tensor) -> Tensor:
    """Group the 6x6 grid of visual tokens by the 3x3 cells: [I, 36, D] -> [I, 9, 4, D]."""
    num_images, _, size = tokens_IVD.shape
    grid = tokens_IVD.reshape(num_images, 3, 2, 3, 2, size)
    return grid.transpose(2, 3).reshape(num_images, NUM_CELLS, 4, size)


@dataclass(frozen=True, kw_only=True)
class CellLoss:
    """The head's loss, and its accuracy with logits averaged over the tokens of a cell."""

    loss: Tensor
    """Scalar to minimize."""

    images: float
    """Share of images in which every property of every cell is correct."""

    shape: float
    """Share of objects with the correct shape."""

    color: float
    """Share of objects with the correct color."""

    size: float
    """Share of objects with the correct size."""


def cell_loss(head: CellHead, features_IVD: Tensor, scenes: Sequence[Scene]) -> CellLoss:
    """Compute the loss and accuracy of the head on visual tokens of scenes."""
    logits_IGKN = [logits.float() for logits in head(features_IVD)]
    labels_IG = _labels(scenes)
    shape_weights = torch.ones(_NUM_CLASSES[0])
    shape_weights[0] = _EMPTY_WEIGHT
    loss = torch.zeros(())
    for part, (logits, labels) in enumerate(zip(logits_IGKN, labels_IG, strict=True)):
        labels_IGK = labels[..., None].expand(*logits.shape[:3])
        loss = loss + _LOSS_WEIGHTS[part] * F.cross_entropy(
            logits.flatten(0, 2),
            labels_IGK.flatten(),
            ignore_index=_IGNORED,
            weight=shape_weights if part == 0 else None,
        )
    is_object_IG = labels_IG[0] > 0
    is_right = [
        (logits.detach().mean(2).argmax(-1) == labels) | (labels == _IGNORED)
        for logits, labels in zip(logits_IGKN[:3], labels_IG[:3], strict=True)
    ]
    is_right_IG = is_right[0] & is_right[1] & is_right[2]
    shape, color, size = (right_IG[is_object_IG].float().mean().item() for right_IG in is_right)
    return CellLoss(
        loss=loss,
        images=is_right_IG.all(1).float().mean().item(),
        shape=shape,
        color=color,
        size=size,
    )


def _labels(scenes: Sequence[Scene]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the classes of every cell, int64 [I, G]; ignored are color and size of empty cells."""
    shape_IG = torch.zeros(len(scenes), NUM_CELLS, dtype=torch.long)
    color_IG = torch.full_like(shape_IG, _IGNORED)
    size_IG = torch.full_like(shape_IG, _IGNORED)
    for i, scene in enumerate(scenes):
        for obj in scene.objects:
            shape_IG[i, obj.cell] = 1 + SHAPES.index(obj.shape)
            color_IG[i, obj.cell] = COLOR_NAMES.index(obj.color)
            size_IG[i, obj.cell] = SIZES.index(obj.size)
    cell_IG = torch.arange(NUM_CELLS).expand(len(scenes), NUM_CELLS)
    return shape_IG, color_IG, size_IG, cell_IG
