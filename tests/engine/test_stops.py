"""When an answer is over and what it says, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from batchvlm.constraints.constraints import special_ids
from batchvlm.engine import stops
from batchvlm.engine.stops import CycleDetector, RowStop
from batchvlm.errors import ErrorType
from batchvlm.records import Completion, FinishReason, Generation

EOS = 2


def row(**changes: Any) -> Generation:
    return Generation(**{"max_new_tokens": 10_000, **changes})


def push_all(stop: RowStop, ids: Sequence[int]) -> int | None:
    """How many of the ids the row took until it was over; None: it is not."""
    return next((n for n, token in enumerate(ids, 1) if stop.push(token)), None)


def answer(stop: RowStop) -> Completion:
    return stop.completion(7, 0.5)


@pytest.fixture(scope="module")
def tokenizer_of_bytes() -> PreTrainedTokenizerFast:
    """As Llama 2's and Mistral's: what has no token of its own is spelled in tokens of one byte."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "\u2581", *"abcde"]
    core = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, [], unk_token="<unk>"))
    core.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    core.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def spelled(tokenizer_of_bytes: Any, text: str) -> list[int]:
    """A text's ids there; the decoder takes a space from its beginning."""
    ids: list[int] = []
    for char in " " + text:
        own = tokenizer_of_bytes.get_vocab().get(char.replace(" ", "\u2581"))
        ids += [own] if own is not None else [3 + byte for byte in char.encode()]
    return ids


class TestLimit:
    def test_a_row_is_done_at_its_limit(self, tokenizer: Any) -> None:
        stop = RowStop(row(max_new_tokens=3), frozenset(), tokenizer)
        assert [stop.push(token) for token in (70, 71, 72)] == [False, False, True]
        assert stop.num_tokens == 3
        assert stop.token_ids == (70, 71, 72)
        assert answer(stop) == Completion(
            row_index=7,
            token_ids=(70, 71, 72),
            text=tokenizer.decode([70, 71, 72]),
            finish_reason=FinishReason.LENGTH,
            latency_s=0.5,
        )

    def test_one_token(self, tokenizer: Any) -> None:
        stop = RowStop(row(max_new_tokens=1), frozenset(), tokenizer)
        assert stop.push(70)


class TestContinued:
    """The text of an answer that continues the prompt's is what follows it."""

    @pytest.mark.parametrize("begun", ["a b", "a\u732b", "\u732b\u732b\u732b", "a "])
    @pytest.mark.parametrize("more", [" c d", "e", "\u732bc", " \u732b"])
    def test_text_follows_what_was_begun(
        self, tokenizer_of_bytes: Any, begun: str, more: str
    ) -> None:
        ids = spelled(tokenizer_of_bytes, begun + more)
        num_begun = len(spelled(tokenizer_of_bytes, begun))
        stop = RowStop(row(), frozenset(), tokenizer_of_bytes, continued_ids=ids[:num_begun][-4:])
        push_all(stop, ids[num_begun:])
        assert answer(stop).text == more
        assert answer(stop).token_ids == tuple(ids[num_begun:])

    def test_a_stop_string_ends_it_too(self, tokenizer_of_bytes: Any) -> None:
        ids = spelled(tokenizer_of_bytes, "ab c d e")
        stop = RowStop(row(stop=("d",)), frozenset(), tokenizer_of_bytes, continued_ids=ids[:3])
        assert push_all(stop, ids[3:]) == 4
        assert answer(stop).text == " c "


class TestEndOfSequence:
    @pytest.mark.parametrize("limit", [3, 9])
    def test_it_is_an_id_of_the_answer_but_no_text(self, tokenizer: Any, limit: int) -> None:
        # 75 is a word of text that this model ends its answers with.
        stop = RowStop(row(max_new_tokens=limit), frozenset([EOS, 75]), tokenizer)
        assert push_all(stop, [70, 71, 75]) == 3
        assert answer(stop).token_ids == (70, 71, 75)
        assert answer(stop).text == tokenizer.decode([70, 71])
        assert answer(stop).finish_reason is FinishReason.STOP

    def test_a_row_that_ignores_it_goes_on(self, tokenizer: Any) -> None:
        stop = RowStop(row(ignore_eos=True, max_new_tokens=4), frozenset([75]), tokenizer)
        assert push_all(stop, [70, 75, 75, 71]) == 4
        assert answer(stop).text == tokenizer.decode([70, 75, 75, 71])
        assert answer(stop).finish_reason is FinishReason.LENGTH


class TestStopStrings:
    def test_none_counts_before_min_new_tokens(self, tokenizer: Any) -> None:
        ids = tokenizer("x y x z x y")["input_ids"]
        stop = RowStop(row(min_new_tokens=4, stop=("x",)), frozenset(), tokenizer)
        end = push_all(stop, ids)
        assert end is not None
        text = tokenizer.decode(ids[:end])
        assert end > 4 and text.count("x") == 2
        assert answer(stop).text == text[: text.rindex("x")]

    def test_one_that_the_last_token_completes_is_a_stop(self, tokenizer: Any) -> None:
        ids = tokenizer("xyz")["input_ids"]
        limited = row(max_new_tokens=len(ids), stop=("z",))
        stop = RowStop(limited, frozenset(), tokenizer)
        assert push_all(stop, ids) == len(ids)
        assert answer(stop).text == "xy"
        assert answer(stop).finish_reason is FinishReason.STOP

    @pytest.mark.parametrize("stops", [("z", "yz"), ("yz", "z")])
    def test_of_two_that_one_token_completes_neither_is_left(
        self, tokenizer: Any, stops: tuple[str, ...]
    ) -> None:
        stop = RowStop(row(stop=stops), frozenset(), tokenizer)
        push_all(stop, tokenizer("xyz")["input_ids"])
        assert answer(stop).text == "x"

    @settings(max_examples=200)
    @given(data=st.data())
    def test_a_row_ends_at_the_first_token_that_completes_one(
        self, tokenizer: Any, data: st.DataObject
    ) -> None:
        # One token a byte, a word of one token, and tokens that are not in the text at all.
        some = [*tokenizer("xyz \u00e9")["input_ids"], *tokenizer("dog")["input_ids"]]
        some += [tokenizer.eos_token_id] * 3
        ids = data.draw(st.lists(st.sampled_from(some), min_size=1, max_size=20))
        text = tokenizer.decode(ids, skip_special_tokens=True)
        string = data.draw(st.text("xyz \u00e9dog", min_size=1, max_size=4))
        if text and data.draw(st.booleans()):
            start = data.draw(st.integers(0, len(text) - 1))
            string = text[start : start + data.draw(st.integers(1, 4))]
        ignoring = row(stop=(string,), ignore_eos=True)
        ends_at = frozenset([tokenizer.eos_token_id])
        stop = RowStop(ignoring, ends_at, tokenizer, special_ids(tokenizer))

        def is_complete(n: int) -> bool:
            return string in tokenizer.decode(ids[:n], skip_special_tokens=True)

        ends = next((n for n in range(1, len(ids) + 1) if is_complete(n)), None)
        assert push_all(stop, ids) == ends
        completion = answer(stop)
        assert completion.finish_reason is (FinishReason.STOP if ends else FinishReason.LENGTH)
        assert completion.token_ids == tuple(ids[:ends])
        assert (string in text) == (ends is not None)
        assert string not in completion.text

    @pytest.mark.parametrize(("string", "is_found"), [("is", True), ("|", False)])
    def test_a_token_that_is_special_though_no_attribute_names_it_is_no_text(
        self, folder: Any, string: str, is_found: bool
    ) -> None:
        changed = transformers.AutoTokenizer.from_pretrained(folder)
        changed.add_tokens([AddedToken("<|reserved_7|>", special=True)])
        reserved = changed.convert_tokens_to_ids("<|reserved_7|>")
        i, s = (changed.convert_tokens_to_ids(c) for c in "is")
        stop = RowStop(row(stop=(string,)), frozenset(), changed, special_ids(changed))
        assert push_all(stop, [i, reserved, s]) == (3 if is_found else None)
        assert answer(stop).text == ("" if is_found else "is")

    @settings(max_examples=200)
    @given(
        text=st.text("ab \n\u00e9\u554f\U0001f600", min_size=1, max_size=12),
        string=st.text("ab \n\u00e9\u554f\U0001f600", min_size=1, max_size=2),
        min_new_tokens=st.integers(0, 8),
    )
    @example(text="a\U0001f600\nb", string="\n", min_new_tokens=0)
    @example(text="a\n\U0001f600b", string="\n", min_new_tokens=5)
    @example(text="\U0001f600\n\U0001f600", string="\U0001f600\n", min_new_tokens=6)
    def test_behind_characters_spelled_in_bytes(
        self, tokenizer_of_bytes: Any, text: str, string: str, min_new_tokens: int
    ) -> None:
        ids = spelled(tokenizer_of_bytes, text)
        asked = row(stop=(string,), min_new_tokens=min_new_tokens)
        stop = RowStop(asked, frozenset(), tokenizer_of_bytes)

        def num_ids(characters: int) -> int:
            return len(spelled(tokenizer_of_bytes, text[:characters]))

        ends = [i for i in range(1, len(text) + 1) if text[:i].endswith(string)]
        end = next((i for i in ends if num_ids(i) >= min_new_tokens), None)
        assert push_all(stop, ids) == (None if end is None else num_ids(end))
        assert answer(stop).text == (text if end is None else text[: end - len(string)])


def first_cycle(ids: Sequence[int]) -> int | None:
    """The definition: after how many tokens the end of `ids` is nothing but a cycle."""
    for n in range(1, len(ids) + 1):
        for period in range(1, stops.MAX_PERIOD + 1):
            covered = max(stops.MIN_CYCLE_TOKENS, stops.MIN_CYCLE_PERIODS * period)
            tail = ids[n - covered : n]
            if n >= covered and all(a == b for a, b in zip(tail, tail[period:], strict=False)):
                return n
    return None


class TestRepetition:
    @settings(max_examples=300)
    @given(data=st.data())
    def test_it_is_found_at_its_first_token(self, data: st.DataObject) -> None:
        with pytest.MonkeyPatch.context() as patch:
            # Small, so that every way into and out of a cycle is met.
            patch.setattr(stops, "MAX_PERIOD", 4)
            patch.setattr(stops, "MIN_CYCLE_TOKENS", 9)
            patch.setattr(stops, "MIN_CYCLE_PERIODS", 3)
            ids: list[int] = []
            for _ in range(data.draw(st.integers(1, 5))):
                ids += data.draw(st.lists(st.integers(0, 6), max_size=5))
                cycle = data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=6))
                ids += (cycle * 20)[: data.draw(st.integers(0, 16))]
            detector = CycleDetector()
            so_far: list[int] = []
            found = None
            for token in ids:
                so_far.append(token)
                if detector.push(so_far):
                    found = len(so_far)
                    break
            assert found == first_cycle(ids)

    @pytest.mark.parametrize("period", [1, 2, 7, 32, 33, 64])
    def test_a_row_ends_in_it_and_keeps_what_it_said(self, tokenizer: Any, period: int) -> None:
        start = [100 + n for n in range(30)]
        cycle = [200 + n for n in range(period)]
        ids = start + cycle * 1000
        stop = RowStop(row(), frozenset([EOS]), tokenizer)
        end = push_all(stop, ids)
        assert end == len(start) + max(512, 16 * period)
        completion = answer(stop)
        assert completion.finish_reason is FinishReason.REPETITION
        assert completion.token_ids == tuple(ids[:end])
        assert completion.text == tokenizer.decode(ids[:end])

    @pytest.mark.parametrize(
        "changes", [{"stop_on_repetition": False}, {"ignore_eos": True}], ids=str
    )
    def test_a_row_may_go_on_in_it(self, tokenizer: Any, changes: dict[str, Any]) -> None:
        stop = RowStop(row(**changes, max_new_tokens=3000), frozenset([EOS]), tokenizer)
        assert push_all(stop, [70] * 3000) == 3000
        assert answer(stop).finish_reason is FinishReason.LENGTH

    def test_none_counts_before_min_new_tokens(self, tokenizer: Any) -> None:
        stop = RowStop(row(min_new_tokens=2000), frozenset([EOS]), tokenizer)
        assert push_all(stop, [70] * 3000) == 2000
        assert answer(stop).finish_reason is FinishReason.REPETITION

    @pytest.mark.parametrize(
        "text",
        [
            "|---" * 40 + "|",
            "\n".join("| dog | | | | |" for _ in range(12)),
            "[" + ", ".join(["[" + ", ".join(["0"] * 8) + "]"] * 8) + "]",
            "-" * 300,
            "\n".join(f"| {n} | a dog | 0 |" for n in range(1000)),
            ", ".join(f'{{"label": "dog", "box": [{n}, 0, 9, 9]}}' for n in range(200)),
        ],
        ids=lambda text: text[:12],
    )
    def test_tables_rules_and_lists_survive(self, tokenizer: Any, text: str) -> None:
        # This tokenizer has hardly any merges: a letter or digit a token, the worst case.
        ids = tokenizer(text)["input_ids"]
        assert len(ids) > 150
        assert push_all(RowStop(row(max_new_tokens=1 << 20), frozenset([EOS]), tokenizer), ids) is (
            None
        )


class TestLogprobs:
    def test_there_is_one_for_each_id(self, tokenizer: Any) -> None:
        stop = RowStop(row(logprobs=True, stop=("y",)), frozenset([EOS]), tokenizer)
        ids = tokenizer("xy")["input_ids"]
        for place, token in enumerate(ids):
            stop.push(token, -0.25 * place)
        assert answer(stop).logprobs == tuple(-0.25 * place for place in range(len(ids)))
        assert answer(stop).text == "x"

    def test_a_row_that_does_not_ask_has_none(self, tokenizer: Any) -> None:
        stop = RowStop(row(), frozenset([EOS]), tokenizer)
        stop.push(70, -0.5)
        assert answer(stop).logprobs is None


def test_logits_that_are_no_numbers_are_the_models_failure() -> None:
    failure = stops.not_finite(3)
    assert failure.error_type is ErrorType.ENGINE
    assert "not finite after 3 tokens" in failure.message
