"""Fusion of a model's small kernels, by torch.compile and torch's own fused kernels.

On a GPU the matrix products take half of a layer's time. The norms, rotations, gates and sums
between them take the rest, since each reads and writes whole tensors. Image encoders are compiled
layer by layer. Decoders are not, because their attention has state that the compiler would trace:
three of their functions are fused instead.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchvlm.config import EngineConfig
from batchvlm.engine.forward.replacements import children, is_rms_norm, is_same, random_like
from batchvlm.words import one_line

log = logging.getLogger(__name__)

_ROTATIONS = ("apply_rotary_pos_emb", "apply_multimodal_rotary_pos_emb")
"""Names in transformers' modelling files of the function that rotates queries and keys."""
_GATED = ("gate_proj", "up_proj", "down_proj")
_ALIGNED = 64
_WORTH_IT_AFTER_S = 60.0


class FusedRMSNorm(nn.Module):
    """Root mean square normalisation in one kernel."""

    def __init__(self, original: Any) -> None:
        super().__init__()
        self.weight = original.weight
        self._eps = float(original.variance_epsilon)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self._eps)


class GatedMLP(nn.Module):
    """A gated MLP whose activation and product are one kernel.

    Args:
        original: the MLP, with `gate_proj`, `up_proj`, `down_proj` and `act_fn`.
        gate: returns the activation of its first argument times its second.
    """

    def __init__(self, original: Any, gate: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = original.gate_proj, original.up_proj
        self.down_proj, self.act_fn = original.down_proj, original.act_fn
        self._gate = gate

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        # Flattened: the compiler specializes a kernel for each dimension of size 1.
        gated = self._gate(gate.view(-1), up.view(-1)).view(gate.shape)
        out: Tensor = self.down_proj(gated)
        return out


class Fusing:
    """Fuses the layers of one model.

    Args:
        model: a transformers model on a GPU; its decoder layers are changed in place.
    """

    def __init__(self, model: Any) -> None:
        self._rotations: dict[str, Callable[..., Any]] = {}
        self._module: Any = None
        self._encoder_layers: list[tuple[nn.Module, Callable[..., Any]]] = []
        """Layers of image encoders, with their compiled forwards."""
        start_s = time.perf_counter()
        layers = list(model.get_decoder().layers)
        try:
            # If the compiler does not work here, it fails at the first small function.
            self._fuse_decoder(layers)
        except Exception as error:
            log.warning(
                "torch.compile does not work here (%s); layers run unfused", one_line(error)
            )
            return
        self._fuse_encoder(model)
        log.debug("fused the layers in %.1f s", time.perf_counter() - start_s)

    def _fuse_decoder(self, layers: list[Any]) -> None:
        gates: dict[type, Callable[[Tensor, Tensor], Tensor]] = {}
        for layer in layers:
            for parent, name, norm in list(children(layer)):
                if is_rms_norm(norm):
                    sample = random_like(norm.weight, (4, norm.weight.shape[0]))
                    if is_same(norm, fused := FusedRMSNorm(norm), sample):
                        parent._modules[name] = fused
            mlp = getattr(layer, "mlp", None)
            if mlp is None or not _is_gated(mlp):
                continue
            act = mlp.act_fn
            if type(act) not in gates:
                gates[type(act)] = torch.compile(_gate_of(act), dynamic=True)
                # Compiled outside `is_same`, which would take an error for a difference.
                with torch.inference_mode():
                    sample = random_like(mlp.gate_proj.weight, (64,))
                    gates[type(act)](sample, sample.clone())
            gated = GatedMLP(mlp, gates[type(act)])
            sample = random_like(mlp.gate_proj.weight, (4, mlp.gate_proj.in_features))
            if is_same(mlp, gated, sample):
                layer.mlp = gated
        attention = getattr(layers[0], "self_attn", None)
        self._module = sys.modules.get(type(attention).__module__)
        for name in _ROTATIONS:
            original = getattr(self._module, name, None)
            if original is not None:
                self._rotations[name] = torch.compile(original, dynamic=True)

    def _fuse_encoder(self, model: Any) -> None:
        decoder = {id(module) for module in model.get_decoder().modules()}
        for stack in model.modules():
            if not isinstance(stack, nn.ModuleList) or len(stack) < 2 or id(stack) in decoder:
                continue
            is_alike = len({type(layer) for layer in stack}) == 1
            if is_alike and any(isinstance(m, nn.Linear) for m in stack[0].modules()):
                for layer in stack:
                    if "forward" not in vars(layer):  # what accelerate has hooked into
                        compiled = torch.compile(layer.forward, dynamic=True)
                        self._encoder_layers.append((layer, compiled))

    @contextmanager
    def encoding(self) -> Iterator[None]:
        """Run the layers of encoders compiled, within this context only.

        Under `generate()` they have another attention, which would be compiled in many pieces.
        """
        for layer, compiled in self._encoder_layers:
            layer.forward = compiled
        try:
            yield
        finally:
            for layer, _ in self._encoder_layers:
                del layer.forward

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """Use the fused rotation in the decoder's module, which other models may share, within."""
        originals = {name: getattr(self._module, name) for name in self._rotations}
        for name, fused in self._rotations.items():
            setattr(self._module, name, fused)
        try:
            yield
        finally:
            for name, original in originals.items():
                setattr(self._module, name, original)


def seconds_to_fusing(cfg: EngineConfig, model: Any) -> float | None:
    """Seconds that an engine works before its model's layers are fused; None: they never are.

    Compiling takes about as long. So a short job does not pay for it, and a long one loses little.
    """
    if cfg.compile is not None:
        return 0.0 if cfg.compile else None
    return _WORTH_IT_AFTER_S if is_half_on_gpu(model) else None


def is_half_on_gpu(model: Any) -> bool:
    """Whether a model computes in half precision on a GPU."""
    return bool(model.device.type == "cuda") and model.dtype in (torch.float16, torch.bfloat16)


@torch.no_grad()
def align(model: Any) -> None:
    """Pad the weights of gated MLPs with zeros to an aligned width, in place.

    The tensor cores need rows of a multiple of 16 bytes: with 3,420 elements a row, as in the
    encoder of Qwen2.5-VL, products run several times slower than with 3,456.
    """
    num_aligned = 0
    for mlp in model.modules():
        if _is_gated(mlp) and mlp.gate_proj.out_features % 8:
            before = {name: getattr(mlp, name) for name in _GATED}
            sample = random_like(mlp.gate_proj.weight, (4, mlp.gate_proj.in_features))
            expected = mlp.forward(sample)
            width = -(-mlp.gate_proj.out_features // _ALIGNED) * _ALIGNED
            for name, linear in before.items():
                setattr(mlp, name, _widened(linear, width, is_input=name == "down_proj"))
            # Sums are taken in another order, so results may differ in the last bits.
            if is_same(lambda x, its=expected: its, mlp.forward, sample):
                num_aligned += 1
                continue
            for name, linear in before.items():
                setattr(mlp, name, linear)
    if num_aligned:
        log.debug("padded the weights of %d gated MLPs", num_aligned)


def _widened(linear: nn.Linear, width: int, *, is_input: bool) -> nn.Linear:
    """A copy of `linear` with its inputs, or else its outputs, padded with zeros to `width`."""
    rows, columns = (linear.out_features, width) if is_input else (width, linear.in_features)
    weight = linear.weight.new_zeros(rows, columns)
    weight[: linear.out_features, : linear.in_features] = linear.weight
    wide = nn.Linear(1, 1, bias=linear.bias is not None, device="meta")
    wide.in_features, wide.out_features = columns, rows
    wide.weight = nn.Parameter(weight, requires_grad=False)
    if linear.bias is not None:
        bias = linear.bias.new_zeros(rows)
        bias[: linear.out_features] = linear.bias
        wide.bias = nn.Parameter(bias, requires_grad=False)
    return wide


@contextmanager
def falling_back() -> Iterator[None]:
    """Run functions that cannot be compiled uncompiled, with torch's own warning."""
    import torch._dynamo.config as config

    before = config.suppress_errors
    config.suppress_errors = True
    try:
        yield
    finally:
        config.suppress_errors = before


def _gate_of(act: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    def gate(x: Tensor, y: Tensor) -> Tensor:
        return act(x) * y

    return gate


def _is_gated(mlp: Any) -> bool:
    # Exactly nn.Linear: subclasses of adapters and quantization do more than a product.
    is_whole = all(type(getattr(mlp, name, None)) is nn.Linear for name in _GATED)
    return is_whole and isinstance(getattr(mlp, "act_fn", None), nn.Module)
