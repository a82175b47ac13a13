"""Cheaper replacements for a model's modules: the same function of the same weights.

Each replacement is compared with the original on random input before it is used. So a module that
only resembles a known one stays as it is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchvlm.engine.forward import trial

log = logging.getLogger(__name__)

_QUICK_GELU = 1.702
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
"""The largest difference allowed, relative to the largest value: a few rounding errors."""

_FEED_FORWARD = (
    ("gate_proj", "act_fn", "down_proj"),
    ("fc1", "act", "fc2"),
    ("fc1", "activation_fn", "fc2"),
)
"""Names of the first linear layer of an MLP, of its activation, and of its last linear layer."""
_ACTIVATIONS = {
    "SiLUActivation": ("swish", ""),
    "SiLU": ("swish", ""),
    "GELU": ("gelu", "none"),
    "GELUActivation": ("gelu", "none"),
    "GELUTanh": ("gelu", "tanh"),
    "ReLU": ("relu", ""),
}
"""Class name -> oneDNN's names for the same function."""
_TRIAL_WIDTH = 512
_TRIAL_ROWS = (16, 256)


class PatchLinear(nn.Module):
    """A convolution whose input is exactly one patch, as a matrix product.

    For an image of 784 patches mkldnn's 3-D convolution took 26 ms (float32) and 39 ms (bfloat16);
    this takes 3.6 ms and 0.5 ms.
    """

    def __init__(self, original: nn.Conv2d | nn.Conv3d) -> None:
        super().__init__()
        self.weight, self.bias = original.weight, original.bias
        self._patch = tuple(original.weight.shape[1:])

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, ...] patches -> [N, E, 1, ...]."""
        if tuple(x.shape[1:]) != self._patch:
            raise ValueError(f"patches of shape {tuple(x.shape[1:])}, not {self._patch}")
        y_NE = F.linear(x.flatten(1), self.weight.flatten(1), self.bias)
        return y_NE.view(*y_NE.shape, *(1 for _ in self._patch[1:]))


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x) by way of SiLU: torch's sigmoid is several times slower on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x * _QUICK_GELU, inplace=True).mul_(1 / _QUICK_GELU)


class RMSNorm(nn.Module):
    """Root mean square normalisation in three passes over the data rather than seven."""

    def __init__(self, original: Any) -> None:
        super().__init__()
        self.weight = original.weight
        eps = float(original.variance_epsilon)
        self._eps = torch.tensor(eps, dtype=torch.float32, device=original.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = torch.addcmul(self._eps, norm, norm, value=1 / x.shape[-1]).rsqrt_()
        normed: Tensor = (x * scale).to(x.dtype)
        return normed.mul_(self.weight)


class PackedLinear(nn.Module):
    """A linear layer with its weights in oneDNN's blocked layout, reordered once for all calls.

    Args:
        original: the plain layer, whose weights may be freed afterwards.

    Attributes:
        activation: oneDNN's names for the activation applied to the result; initially "none".
    """

    def __init__(self, original: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = original.in_features, original.out_features
        self.bias = original.bias
        self.weight = torch.ops.mkldnn._reorder_linear_weight(original.weight.detach())
        """Has shape, dtype and device as usual; `to_dense()` returns the plain weights."""
        self.activation = ("none", "")

    def scaled(self, factor: float, *, is_bias_scaled: bool = True) -> PackedLinear:
        """A copy whose result is multiplied by a factor."""
        plain = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        weight = self.weight.to_dense().mul_(factor)
        plain.weight = nn.Parameter(weight, requires_grad=False)
        if self.bias is not None:
            bias = self.bias * factor if is_bias_scaled else self.bias
            plain.bias = nn.Parameter(bias.detach(), requires_grad=False)
        return PackedLinear(plain)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        name, algorithm = self.activation
        y: Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self.weight, self.bias, name, [], algorithm
        )
        return y


def tune(model: Any) -> None:
    """Replace modules that are inefficient on the model's device, in place."""
    is_cpu = model.device.type == "cpu"
    num_replaced: dict[str, int] = {}
    # By name: a list of modules would keep the weights of replaced ones alive.
    for parent, name in [(parent, name) for parent, name, _ in children(model)]:
        module: Any = getattr(parent, name)
        new: nn.Module | None = None
        sample: Tensor | None = None
        if _is_patch_embedding(module):
            new = PatchLinear(module)
            sample = random_like(module.weight, (4, *module.weight.shape[1:]))
        elif is_cpu and type(module).__name__ == "QuickGELUActivation":
            new, sample = QuickGELU(), random_like(next(model.parameters()), (4, 64))
        elif is_cpu and is_rms_norm(module):
            new, sample = RMSNorm(module), random_like(module.weight, (4, module.weight.shape[0]))
        elif is_cpu and _is_plain_linear(module) and is_packing_good(module.weight.dtype):
            new, sample = PackedLinear(module), random_like(module.weight, (4, module.in_features))
        if new is not None and sample is not None and is_same(module, new, sample):
            parent._modules[name] = new
            kind = type(new).__name__
            num_replaced[kind] = num_replaced.get(kind, 0) + 1
    for part in model.modules():
        if _fold_activation(part):
            num_replaced["activation"] = num_replaced.get("activation", 0) + 1
    if num_replaced:
        log.debug("replaced %s", ", ".join(f"{n} {kind}" for kind, n in num_replaced.items()))


def children(model: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    """Yield every submodule of a model: its parent, its name in the parent, and the module."""
    for parent in model.modules():
        for name, module in parent.named_children():
            yield parent, name, module


def _is_patch_embedding(module: Any) -> bool:
    # Not 2-D convolutions, which run over whole images: torch chooses their algorithm itself.
    return (
        isinstance(module, nn.Conv3d)
        and module.kernel_size == module.stride
        and module.groups == 1
        and set(module.padding) == {0}
        and set(module.dilation) == {1}
    )


def _fold_activation(mlp: nn.Module) -> bool:
    """Fold an MLP's activation into its first linear layer; return whether that was possible."""
    for first, act, last in _FEED_FORWARD:
        product, activation, second = (getattr(mlp, name, None) for name in (first, act, last))
        if not isinstance(product, PackedLinear) or not isinstance(second, PackedLinear):
            continue
        name = _ACTIVATIONS.get(type(activation).__name__)
        if isinstance(activation, nn.GELU) and activation.approximate == "tanh":
            name = _ACTIVATIONS["GELUTanh"]
        folded, undone = product, second
        if isinstance(activation, QuickGELU) and product.weight.dtype == torch.float32:
            # x sigmoid(a x) is silu(a x) / a. In half precision scaled weights would be rounded.
            name = _ACTIVATIONS["SiLU"]
            folded = product.scaled(_QUICK_GELU)
            undone = second.scaled(1 / _QUICK_GELU, is_bias_scaled=False)
        if name is None:
            continue
        sample = random_like(product.weight, (4, product.in_features))
        try:
            with torch.inference_mode():
                expected = mlp(sample)
        except TypeError:
            continue  # a whole layer, which takes more than hidden states (Whisper's encoder)
        folded.activation = name
        for part, new in ((first, folded), (act, nn.Identity()), (last, undone)):
            setattr(mlp, part, new)
        if is_same(lambda x, its=expected: its, mlp, sample):
            return True
        product.activation = ("none", "")
        for part, old in ((first, product), (act, activation), (last, second)):
            setattr(mlp, part, old)
    return False


def _is_plain_linear(module: Any) -> bool:
    # Not modules with hooks of accelerate or peft, nor sharded weights.
    return (
        type(module) is nn.Linear
        and type(module.weight) is nn.Parameter
        and not hasattr(module, "_hf_hook")
        and not (module._forward_hooks or module._forward_pre_hooks)
    )


@cache
def is_packing_good(dtype: torch.dtype) -> bool:
    """Whether products with reordered weights are no slower on this CPU than plain ones."""
    plain = nn.Linear(_TRIAL_WIDTH, _TRIAL_WIDTH, bias=False, device="meta")
    weight = random_like(torch.empty(0, dtype=dtype), (_TRIAL_WIDTH, _TRIAL_WIDTH))
    plain.weight = nn.Parameter(weight, requires_grad=False)
    with torch.inference_mode():
        try:
            packed = PackedLinear(plain)
        except (RuntimeError, AttributeError):
            return False  # torch without oneDNN, or a CPU without instructions for this dtype
        samples = [random_like(plain.weight, (num, _TRIAL_WIDTH)) for num in _TRIAL_ROWS]
        ways = [(partial(packed, x), partial(plain, x)) for x in samples]
        return all(trial.fastest(pair) == 0 for pair in ways)


def is_rms_norm(module: Any) -> bool:
    """Whether a module looks like an RMSNorm of transformers."""
    weight = getattr(module, "weight", None)
    return (
        type(module).__name__.endswith("RMSNorm")
        and isinstance(weight, Tensor)
        and weight.dim() == 1
        and hasattr(module, "variance_epsilon")
    )


def random_like(weight: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Normally distributed numbers with a weight's device and dtype, the same in every call."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(weight.device, weight.dtype)


@torch.inference_mode()
def is_same(original: Callable[..., Any], new: Callable[..., Any], sample: Tensor) -> bool:
    """Whether two functions return the same for a sample, up to a few rounding errors."""
    try:
        expected, got = original(sample), new(sample)
    except Exception:
        return False
    if expected.shape != got.shape or expected.dtype != got.dtype:
        return False
    tolerance = _TOLERANCE.get(sample.dtype, 0.0) * float(expected.abs().max())
    return bool((expected - got).abs().max() <= tolerance)
