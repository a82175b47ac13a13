"""Runs a transformers model for the slot engine: packed prefill, and decode steps over slots.

Positions, token types and image features are computed per row, so a prompt's result does not depend
on the other rows in its pack. Differences between model families are handled here.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from batchvlm.engine.collate import TOKEN_TYPES
from batchvlm.engine.forward import attention, flash, slot_kernel
from batchvlm.engine.forward.cache import PackedCache, RowCache, SlotCache, cached_layers
from batchvlm.engine.forward.fusing import Fusing
from batchvlm.engine.forward.graphs import StepGraphs
from batchvlm.engine.forward.layout import Newest, Packed, Runs, Slots, Span
from batchvlm.engine.forward.replacements import PackedLinear
from batchvlm.engine.forward.rotations import Rotations
from batchvlm.engine.forward.streams import SharedContext
from batchvlm.records import Sample

# Shape legend: as in attention.py; R rope axes (3 for Qwen-VL and similar, 3 or 4 for HunyuanOCR,
# else 1), V vocabulary.


@dataclass(frozen=True, slots=True)
class Prompt:
    """The decoder's input for one row's prompt."""

    ids_T: Tensor
    """int64 [T]."""
    positions_RT: Tensor
    """int64 [R, T]: rotary positions."""
    rope_delta: int
    """Rotary position minus index in the sequence, for tokens after the prompt."""
    types: Mapping[str, Tensor]
    """Token types by argument name, int64 [T] each; which there are depends on the family."""

    def __len__(self) -> int:
        return len(self.ids_T)


@dataclass(frozen=True, slots=True)
class Piece:
    """A chunk of a prompt for prefill: tokens `start` to `stop`."""

    prompt: Prompt
    start: int
    stop: int
    past: RowCache | None = None
    """KV cache of the prompt's tokens before `start`; None if `start` is 0."""


@dataclass(frozen=True, slots=True)
class Branches:
    """Alternative continuations of a prompt, as a token tree of n nodes."""

    prompt: Prompt
    past: RowCache
    """KV cache of the whole prompt."""
    ids: npt.NDArray[np.int64]
    """[n]: the token of each node; n >= 1."""
    sees: npt.NDArray[np.bool_]
    """[n, n]: the attention mask: each node attends to itself and its ancestors."""


class Decoder:
    """Runs a model over packed prompts and over slots.

    Args:
        model: a transformers model for image-text-to-text, in evaluation mode.
        has_graphs: whether decode steps on a GPU are replayed from CUDA graphs.
        has_kernel: whether they may use our own attention kernel, if a trial finds it faster.
    """

    def __init__(self, model: Any, *, has_graphs: bool = True, has_kernel: bool = True) -> None:
        self._model = model
        self._config = model.get_decoder().config
        layers = cached_layers(self._config)
        self._num_layers = len(layers)
        self._default_attention = self._config._attn_implementation
        self._rope_index = getattr(model.base_model, "get_rope_index", None)
        self._rope_names = (
            frozenset(inspect.signature(self._rope_index).parameters) if self._rope_index else ()
        )
        sections = (getattr(self._config, "rope_parameters", None) or {}).get("mrope_section")
        self._num_axes = len(sections or (0, 0, 0))
        # Some models pass **kwargs on to the base model, so both signatures are searched.
        shown = inspect.signature(model.forward).parameters
        inner = inspect.signature(model.base_model.forward).parameters
        self._types = [name for name in {**shown, **inner} if name.endswith(TOKEN_TYPES)]
        self._keeps_logits = "logits_to_keep" in shown
        """Whether the model computes the logits of chosen tokens alone."""
        # Renamed in transformers 5.24.
        self._cache_name = "cache" if "cache" in shown else "past_key_values"
        self.device: torch.device = model.device
        self._fusing: Fusing | None = None
        self._rotations = Rotations(model)
        self._changed = SharedContext()
        self._lock = threading.Lock()
        has_cap = getattr(self._config, "attn_logit_softcapping", None) is not None
        kinds = sorted(set(layers))
        if self.device.type == "cpu":
            for heads in kinds:
                attention.run_trials(*heads[:3], model.dtype)
        like = torch.empty(0, dtype=model.dtype, device=self.device)
        self.is_varlen = not has_cap and all(
            flash.is_able(like.new_empty(0, heads.size)) for heads in kinds
        )
        """Whether attention over slots reads only the positions that each row uses."""
        may_have_kernel = self.is_varlen and has_kernel
        self.has_kernel = may_have_kernel and all(
            slot_kernel.is_faster(*heads[:3], model.dtype, self.device) for heads in kinds
        )
        """Whether decode steps use the slot kernel instead of flash attention."""
        self._graphs: StepGraphs | None = None
        if has_graphs and self.device.type == "cuda":
            self._graphs = StepGraphs(self.device, is_by_length=not self.is_varlen)
        _trim_last_layer(model.get_decoder())
        self._latent_layers = attention.keep_latents(model.get_decoder())
        token_id = getattr(model.config, "image_token_id", None)
        if token_id is None:
            token_id = getattr(model.config, "image_token_index", None)
        self._image_token_id: int | None = token_id
        # Ovis2's encoder also embeds the tokens around an image.
        self._mark_ids = getattr(model.config, "visual_indicator_token_ids", None) or []
        self._sees_ahead: dict[bool, bool] = {}
        """Has images -> whether tokens of such prompts attend to later ones, once one ran."""

    def prompt(self, sample: Sample) -> Prompt:
        """Return a sample's prompt, with the positions that the model assigns to it on its own."""
        features = {n: torch.from_numpy(a) for n, a in sample.features.items()}
        ids_1T = features["input_ids"]
        num_tokens = ids_1T.shape[1]
        none_1T = torch.zeros_like(ids_1T)
        positions_RT, delta = torch.arange(num_tokens)[None], 0
        if self._rope_index is not None:
            given = {n: f for n, f in features.items() if n in self._rope_names}
            if "mm_token_type_ids" in self._rope_names:
                given.setdefault("mm_token_type_ids", none_1T)
            positions_R1T, delta_1 = self._rope_index(**given)
            positions_RT, delta = positions_R1T[:, 0], int(delta_1)
        return Prompt(
            ids_T=self.to_device(ids_1T[0]),
            positions_RT=self.to_device(positions_RT),
            rope_delta=delta,
            types={n: self.to_device(features.get(n, none_1T)[0]) for n in self._types},
        )

    @torch.inference_mode()
    def prefill(
        self, pieces: Sequence[Piece], images: Any, *, ends: Sequence[int]
    ) -> tuple[Tensor, PackedCache]:
        """Prefill chunks of prompts, concatenated without padding. Thread-safe.

        Args:
            pieces: at most one per prompt.
            images: the encoder's output for the images in the pieces, in order; None without any.
            ends: indices of the pieces that end their prompt.

        Returns:
            logits_EV: [E, V], next-token logits after each piece in `ends`.
            cache: KV cache of all pieces, concatenated.
        """
        ids_T = torch.cat([p.prompt.ids_T[p.start : p.stop] for p in pieces])
        positions_RT = torch.cat([p.prompt.positions_RT[:, p.start : p.stop] for p in pieces], 1)
        inputs: dict[str, Any] = {}
        for name in self._types:
            types_T = torch.cat([p.prompt.types[name][p.start : p.stop] for p in pieces])
            inputs[name] = types_T[None]
        if images is not None:
            inputs["mm_encoder_outputs"] = {"image": images}
        bounds = [0, *np.cumsum([p.stop - p.start for p in pieces]).tolist()]
        # At least one position: models do not accept an empty list.
        last_E = self.to_device(torch.tensor([bounds[i + 1] - 1 for i in ends] or [0]))
        cache = PackedCache(self._num_layers, latent_layers=self._latent_layers)
        layout = Packed(
            bounds=tuple(bounds),
            past=tuple(p.past.layers if p.past is not None else None for p in pieces),
            last_E=last_E,
        )
        out = self._forward(
            layout, cache, ids_T[None], positions_RT[:, None], logits_to_keep=last_E, **inputs
        )
        kind = images is not None
        with self._lock:
            self._sees_ahead[kind] = self._sees_ahead.get(kind, False) or layout.sees_ahead
        return self._kept(out, last_E)[: len(ends)], cache

    @torch.inference_mode()
    def branch(self, branches: Sequence[Branches]) -> Tensor:
        """Run the nodes of several token trees in one forward pass.

        Args:
            branches: one or more trees per prompt.

        Returns:
            logits_TV: [T, V], next-token logits after each node, trees concatenated.
        """
        bounds = [0, *np.cumsum([len(b.ids) for b in branches]).tolist()]
        ids = np.concatenate([b.ids for b in branches])
        rope = np.concatenate(
            [b.past.length + b.sees.sum(1) - 1 + b.prompt.rope_delta for b in branches]
        )
        layout = Packed(
            bounds=tuple(bounds),
            past=tuple(b.past.layers for b in branches),
            trees=tuple(self.to_device(torch.from_numpy(b.sees)) for b in branches),
        )
        out = self._forward(
            layout,
            PackedCache(self._num_layers, is_prompt=False),
            self.to_device(torch.from_numpy(ids))[None],
            self.to_device(torch.from_numpy(rope))[None, None],
            logits_to_keep=0,
        )
        logits_TV: Tensor = out.logits[0]
        return logits_TV

    def is_causal(self, *, has_images: bool) -> bool:
        """Whether such prompts are known to be causal, so that prefill may be chunked. Those
        without images are if those with images are."""
        kinds = (True,) if has_images else (True, False)
        return any(self._sees_ahead.get(kind) is False for kind in kinds)

    def has_prefilled(self, *, has_images: bool) -> bool:
        """Whether a prompt with or without images was prefilled, so that `is_causal` is exact."""
        return has_images in self._sees_ahead

    def image_places(self, sample: Sample) -> npt.NDArray[np.intp] | None:
        """Return the indices of a prompt's image tokens; None if the model has no such token id.

        They include tokens around an image that the encoder embeds as well (Ovis2).
        """
        if self._image_token_id is None:
            return None
        ids_T = sample.features["input_ids"][0]
        return np.flatnonzero(np.isin(ids_T, [self._image_token_id, *self._mark_ids]))

    @torch.inference_mode()
    def step(
        self,
        cache: SlotCache,
        newest: Newest,
        spans: Sequence[Span],
        runs: Mapping[int, Sequence[int]] | None = None,
        *,
        num_used: int | None = None,
    ) -> Tensor:
        """Run a decode step for B contiguous slots: their newest tokens, and forced ones after.

        Args:
            cache: KV cache of N slots.
            newest: the newest token of each of the N slots.
            spans: the B slots, grouped for attention.
            runs: slot -> forced ids after its newest token.
            num_used: number of slots in use, counted from slot 0; None: up to the end of `spans`.

        Returns:
            logits_BV: [B, V], next-token logits of each slot. On a GPU they are valid until the
                next step.
        """
        first, stop = spans[0].start, spans[-1].stop
        if runs:
            return self._step_with_runs(cache, newest, spans, runs)
        ids_N, positions_N, deltas_N = newest.ids_N, newest.positions_N, newest.deltas_N
        if self._graphs is not None and first == 0:

            def forward(size: int, length: int, positions_C: Tensor) -> Tensor:
                whole = (Span(0, size, length),)
                return self._step(cache, ids_N[:size], positions_C, deltas_N[:size], 0, whole)

            length = max(span.length for span in spans)
            logits_BV = self._graphs.step(
                cache, positions_N, stop, length, forward, num_used=num_used or stop
            )
            if logits_BV is not None:
                return logits_BV
        return self._step(
            cache,
            ids_N[first:stop],
            positions_N[first:stop],
            deltas_N[first:stop],
            first,
            tuple(Span(s.start - first, s.stop - first, s.length) for s in spans),
        )

    def _step(
        self,
        cache: SlotCache,
        ids_B: Tensor,
        positions_B: Tensor,
        deltas_B: Tensor,
        first: int,
        spans: tuple[Span, ...],
    ) -> Tensor:
        cache.use(first, first + len(ids_B), positions_B)
        rope_1B1 = (positions_B + deltas_B)[None, :, None]
        layout = Slots(positions_B, spans, has_kernel=self.has_kernel)
        out = self._forward(layout, cache, ids_B[:, None], rope_1B1, logits_to_keep=1)
        logits_BV: Tensor = out.logits[:, -1]
        return logits_BV

    def _step_with_runs(
        self,
        cache: SlotCache,
        newest: Newest,
        spans: Sequence[Span],
        runs: Mapping[int, Sequence[int]],
    ) -> Tensor:
        first, stop = spans[0].start, spans[-1].stop
        own = tuple(Span(s.start - first, s.stop - first, s.length) for s in spans)
        laid = Runs.after(own, {slot - first: len(ids) for slot, ids in runs.items()})
        last = list(range(stop - first))
        num_tokens = stop - first
        for slot, ids in runs.items():
            num_tokens += len(ids)
            last[slot - first] = num_tokens - 1
        more = [(slot, id_, n) for slot, ids in runs.items() for n, id_ in enumerate(ids, 1)]
        slots_M, ids_M, ahead_M = self.to_device(torch.tensor(more)).unbind(1)
        slots_T = torch.cat([torch.arange(first, stop, device=slots_M.device), slots_M])
        positions_T = torch.cat(
            [newest.positions_N[first:stop], newest.positions_N[slots_M] + ahead_M]
        )
        last_E = self.to_device(torch.tensor(last))
        cache.use(first, stop, positions_T, slots_T)
        layout = Slots(positions_T, own, runs=laid.to(self.to_device), last_E=last_E)
        ids_1T = torch.cat([newest.ids_N[first:stop], ids_M])[None]
        rope_11T = (positions_T + newest.deltas_N[slots_T])[None, None]
        out = self._forward(layout, cache, ids_1T, rope_11T, logits_to_keep=last_E)
        return self._kept(out, last_E)

    def _forward(
        self,
        layout: Packed | Slots,
        cache: PackedCache | SlotCache,
        ids_BT: Tensor,
        positions_RBT: Tensor,
        **inputs: Any,
    ) -> Any:
        """Run the model in a layout; return its output.

        Args:
            layout: where attention finds each row's tokens, and its keys and values.
            cache: takes the new keys and values.
            ids_BT: int64 [B, T]; B is 1 unless each slot has one token.
            positions_RBT: int64 [R, B, T], rotary positions; R may be 1 where all axes are alike.
            inputs: further arguments of the model.
        """
        with attention.attending(layout), self._changed.within(self._forward_context):
            return self._model(
                input_ids=ids_BT,
                position_ids=self._axes(positions_RBT),
                **{self._cache_name: cache},
                use_cache=True,
                **inputs,
            )

    def fuse(self) -> None:
        """Use the fused forms of the model's layers in all later forward passes."""
        self.forget_slots()
        self._fusing = Fusing(self._model)

    @contextmanager
    def encoding(self) -> Iterator[None]:
        """Context in which the model's image encoder runs."""
        with self._fusing.encoding() if self._fusing is not None else nullcontext():
            yield

    def forget_slots(self) -> None:
        """Drop the CUDA graphs of the current slots, so that these can be freed."""
        if self._graphs is not None:
            self._graphs.forget()

    def to_device(self, tensor: Tensor) -> Tensor:
        """Copy to the model's device without synchronizing with it."""
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def _kept(self, out: Any, last_E: Tensor) -> Tensor:
        """Return the logits of these tokens [E, V], which may be all that were computed."""
        logits_TV: Tensor = out.logits[0]
        return logits_TV if self._keeps_logits else logits_TV[last_E]

    def _axes(self, positions: Tensor) -> Tensor:
        """Reshape positions [R, B, T] to the model's form: [B, T], or one [B, T] for each axis."""
        if self._rope_index is None:
            return positions[0]
        return positions.expand(self._num_axes, -1, -1)

    @contextmanager
    def _forward_context(self) -> Iterator[None]:
        """Let the model attend in our layouts, with what is faster for its layers here."""
        # Only during this engine's forward passes: the model may be used elsewhere too.
        self._config._attn_implementation = attention.NAME
        try:
            fusing, rotations = self._fusing, self._rotations
            with fusing.decoding() if fusing is not None else rotations.replaced():
                yield
        finally:
            self._config._attn_implementation = self._default_attention


def _trim_last_layer(decoder: Any) -> None:
    """Make the last layer's MLP and output projection skip tokens whose logits are not needed."""
    layer = decoder.layers[-1]
    parts = [(layer, "mlp"), (getattr(layer, "self_attn", None), "o_proj")]
    for parent, name in parts:
        inner: Any = getattr(parent, name, None)
        if isinstance(inner, (nn.Linear, PackedLinear)) or type(inner).__name__.endswith("MLP"):
            setattr(parent, name, attention.OnlyLast(inner))
