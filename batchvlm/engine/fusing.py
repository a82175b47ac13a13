"""Small kernels of a model fused into few, by torch.compile and torch's own fused ones.

On a GPU a layer's products take half of its time; norms, rotations, gates and sums between them,
each reading and writing everything anew, take the rest. Image encoders are compiled layer by layer.
Decoders are not: their attention has state that a compiler would look into, and three functions of
theirs make the difference.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchvlm.config import EngineConfig
from batchvlm.engine.kernels import _is_rms_norm as is_rms_norm
from batchvlm.engine.kernels import _is_same as is_same

log = logging.getLogger(__name__)

_ROTATIONS = ("apply_rotary_pos_emb", "apply_multimodal_rotary_pos_emb")
"""What modelling files of transformers call the function that rotates queries and keys."""


class FusedRMSNorm(nn.Module):
    """Root mean square normalisation in one kernel."""

    def __init__(self, original: Any) -> None:
        super().__init__()
        self.weight = original.weight
        self._eps = float(original.variance_epsilon)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self._eps)


class GatedMLP(nn.Module):
    """A feed-forward part whose activation and gate are one kernel.

    Args:
        original: the part, with `gate_proj`, `up_proj`, `down_proj` and `act_fn`.
        gate: activation of the first times the second.
    """

    def __init__(self, original: Any, gate: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = original.gate_proj, original.up_proj
        self.down_proj, self.act_fn = original.down_proj, original.act_fn
        self._gate = gate

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        # In one dimension: the compiler makes a kernel of its own for each case of a size of one.
        gated = self._gate(gate.view(-1), up.view(-1)).view(gate.shape)
        out: Tensor = self.down_proj(gated)
        return out


class Fusing:
    """The fused forms of one model.

    Args:
        model: a transformers model on a GPU.
    """

    def __init__(self, model: Any) -> None:
        self._rotations: dict[str, Callable[..., Any]] = {}
        self._module: Any = None
        layers = list(model.get_decoder().layers)
        try:
            # Whatever the compiler lacks here shows at the first small function.
            self._fuse_decoder(layers)
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            log.warning("torch.compile does not work here (%s); layers run unfused", reason)
            return
        self._fuse_encoder(model)

    def _fuse_decoder(self, layers: list[Any]) -> None:
        gates: dict[type, Callable[[Tensor, Tensor], Tensor]] = {}
        for layer in layers:
            for parent, name, norm in list(_children(layer)):
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
                # Outside of the comparison, which would take an error for a difference.
                gates[type(act)](*random_like(mlp.gate_proj.weight, (2, 64)))
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
                    layer.compile(dynamic=True)

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """Let the decoder rotate by the fused function: within only, others use that file too."""
        originals = {name: getattr(self._module, name) for name in self._rotations}
        for name, fused in self._rotations.items():
            setattr(self._module, name, fused)
        try:
            yield
        finally:
            for name, original in originals.items():
                setattr(self._module, name, original)


def is_fused(cfg: EngineConfig, model: Any) -> bool:
    """Whether a model's layers are to be fused: where they are asked to, else where it pays."""
    if cfg.compile is not None:
        return cfg.compile
    return bool(model.device.type == "cuda") and model.dtype in (torch.float16, torch.bfloat16)


@contextmanager
def falling_back() -> Iterator[None]:
    """Let what cannot be compiled run as it is, with torch's own warning."""
    import torch._dynamo.config as config

    before = config.suppress_errors
    config.suppress_errors = True
    try:
        yield
    finally:
        config.suppress_errors = before


def random_like(weight: Tensor, shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(weight.device, weight.dtype)


def _gate_of(act: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    def gate(x: Tensor, y: Tensor) -> Tensor:
        return act(x) * y

    return gate


def _is_gated(mlp: Any) -> bool:
    names = ("gate_proj", "up_proj", "down_proj")
    is_whole = all(isinstance(getattr(mlp, name, None), nn.Linear) for name in names)
    return is_whole and isinstance(getattr(mlp, "act_fn", None), nn.Module)


def _children(layer: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    for parent in layer.modules():
        for name, module in parent.named_children():
            yield parent, name, module
