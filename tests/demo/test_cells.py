import torch

from batchvlm.demo.cells import CellHead, cell_loss, gather_cells
from batchvlm.demo.model import HIDDEN_SIZE, NUM_IMAGE_TOKENS
from batchvlm.demo.world import Object, Scene

SCENE = Scene(
    objects=(
        Object(shape="circle", color="red", size="small", cell=1),
        Object(shape="cross", color="orange", size="large", cell=6),
    ),
    background="light",
)


def test_tokens_are_gathered_by_their_cell() -> None:
    token = torch.arange(NUM_IMAGE_TOKENS)
    cell = token // 6 // 2 * 3 + token % 6 // 2
    gathered = gather_cells(cell[None, :, None])
    assert torch.equal(gathered, torch.arange(9)[None, :, None, None].expand(1, 9, 4, 1))


def test_the_head_can_learn_a_scene() -> None:
    torch.manual_seed(0)
    head = CellHead()
    features = torch.randn(1, NUM_IMAGE_TOKENS, HIDDEN_SIZE)
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.02)
    first = cell_loss(head, features, [SCENE])
    for _ in range(60):
        optimizer.zero_grad()
        cell_loss(head, features, [SCENE]).loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    last = cell_loss(head, features, [SCENE])
    assert last.loss < first.loss / 10
    assert (last.images, last.shape, last.color, last.size) == (1, 1, 1, 1)
    other = Scene(objects=SCENE.objects[:1], background="light")
    assert cell_loss(head, features, [other]).images == 0
