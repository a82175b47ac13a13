from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import Idefics3Processor

from batchvlm.demo import packing, world
from batchvlm.demo.model import build_model
from batchvlm.demo.packing import IGNORED, ROW_LENGTH, Packer, Row, draw_rows
from batchvlm.demo.questions import Question

COLOR = Question(kind="color", text="What color is the star?", answer="red")
WHERE = Question(kind="where", text="Where is the star?", answer="top left")
CAPTION = Question(kind="caption", text="Describe the image.", answer="A small red star.")


def test_prefix_and_conversation_are_what_the_processor_says(
    processor: Idefics3Processor,
) -> None:
    packer = Packer(processor)
    call: Any = processor
    picture = Image.new("RGB", (120, 96), (10, 200, 60))
    messages: list[dict[str, Any]] = []
    for turn, question in enumerate((COLOR, WHERE)):
        images = [{"type": "image", "image": picture}] * (2 if turn == 0 else 0)
        text = {"type": "text", "text": question.text}
        messages.append({"role": "user", "content": [*images, text]})
        answer = {"type": "text", "text": question.answer}
        messages.append({"role": "assistant", "content": [answer]})
    expected = call.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"][0]
    packed = packer.prefix(2) + [token for token, _ in packer.conversation((COLOR, WHERE))]
    newline = call.tokenizer("\n")["input_ids"]
    assert list(expected) == packed + newline


def test_labels_say_the_answers_and_nothing_else(processor: Idefics3Processor) -> None:
    rows = [
        Row(images=(0,), conversations=[[CAPTION], [COLOR, WHERE]]),
        Row(images=(1, 0), conversations=[[WHERE]]),
    ]
    batch = Packer(processor).pack(rows)
    tokenizer: Any = processor.tokenizer
    assert batch.kinds == ["caption", "color", "where", "where"]
    assert batch.images == [0, 1, 0]
    for turn, question in enumerate((CAPTION, COLOR, WHERE, WHERE)):
        is_turn = batch.turns_RT == turn
        assert tokenizer.decode(batch.labels_RT[is_turn]) == question.answer + "<end_of_utterance>"
        assert (batch.weights_RT[is_turn] == (1.0 if question is CAPTION else 3.0)).all()
    assert ((batch.labels_RT == IGNORED) == (batch.turns_RT == -1)).all()


def test_conversations_that_do_not_fit_are_left_out(processor: Idefics3Processor) -> None:
    row = Row(images=(0,), conversations=[[COLOR] for _ in range(50)])
    batch = Packer(processor).pack([row])
    assert batch.ids_RT.shape == (1, ROW_LENGTH)
    assert 5 < len(batch.kinds) < 50
    assert int(batch.turns_RT.max()) == len(batch.kinds) - 1


def test_packed_segments_answer_as_if_alone(processor: Idefics3Processor) -> None:
    """The block mask and the positions: no segment may change another's logits."""
    packer = Packer(processor)
    model: Any = build_model(processor, seed=0)
    model.set_attn_implementation("eager")
    conversations = [[CAPTION], [COLOR, WHERE], [WHERE]]
    packed = packer.pack([Row(images=(0,), conversations=conversations)])
    with torch.inference_mode():
        together = model.lm_head(_hidden(model, packed)[0])
        offset = len(packer.prefix(1))
        for conversation in conversations:
            alone = packer.pack([Row(images=(0,), conversations=[conversation])])
            length = len(packer.conversation(conversation))
            start = len(packer.prefix(1))
            ids_T = alone.ids_RT[:, : start + length]
            # No mask, no positions: plain causal attention from zero.
            expected = model(input_ids=ids_T).logits[0, start:]
            torch.testing.assert_close(
                together[offset : offset + length], expected, atol=1e-4, rtol=1e-3
            )
            offset += length


def _hidden(model: Any, batch: packing.PackedBatch) -> torch.Tensor:
    mask = torch.zeros(batch.mask_R1TT.shape).masked_fill_(~batch.mask_R1TT, -1e9)
    hidden: torch.Tensor = model.model.text_model(
        inputs_embeds=model.model.text_model.embed_tokens(batch.ids_RT),
        attention_mask=mask,
        position_ids=batch.positions_RT,
        use_cache=False,
    ).last_hidden_state
    return hidden


def test_drawn_rows_cover_images_and_pairs() -> None:
    rng = np.random.default_rng(0)
    scenes = [world.draw_scene(rng) for _ in range(16)]
    rows = draw_rows(scenes, 4, rng)
    assert [row.images for row in rows[:16]] == [(i,) for i in range(16)]
    assert [len(row.images) for row in rows[16:]] == [2] * 4
    assert all(first != second for first, second in (row.images for row in rows[16:]))
    kinds = {q.kind for row in rows for turns in row.conversations for q in turns}
    assert {"caption", "json", "where", "count_x", "more", "which"} <= kinds
    assert any(len(turns) > 1 for row in rows for turns in row.conversations)
