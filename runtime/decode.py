"""One token of every sequence through the whole model, in the fewest launches and without asking the device anything.

Between the sublayers travel the normed activations x [B, D] and what is to be added to them in float32, in S parts
[S, B, D] that the next norm sums: no sublayer writes a residual. Array axes: B batch, D hidden, L places of the cache,
R rotated pairs, V vocabulary.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minibble.runtime.attention import Step, frequencies
from minibble.runtime.kernels.norm import norm_residual, rms_norm
from minibble.runtime.kernels.rope_cache import angles
from minibble.runtime.layers import Linear
from minibble.runtime.state import HybridState

if TYPE_CHECKING:
    from minibble.runtime.model import MiniMaxForCausalLM


@dataclass(frozen=True)
class Inputs:
    """What changes from token to token, in places of its own on the device."""

    ids: Tensor  # int64 [B]
    positions: Tensor  # int64 [B], real tokens before this one
    past: Tensor  # int32 [1], places of the cache before this one's
    valid: Tensor  # bool [B, L], False at padding
    frequencies: Tensor  # float64 [R]

    @classmethod
    def empty(cls, model: "MiniMaxForCausalLM", batch: int, capacity: int) -> "Inputs":
        """Room for `batch` sequences over caches of `capacity` places."""
        device = model.device
        return cls(
            ids=torch.zeros(batch, dtype=torch.int64, device=device),
            positions=torch.zeros(batch, dtype=torch.int64, device=device),
            past=torch.zeros(1, dtype=torch.int32, device=device),
            valid=torch.ones(batch, capacity, dtype=torch.bool, device=device),
            frequencies=frequencies(model.minibble, device),
        )


def decode_step(model: "MiniMaxForCausalLM", inputs: Inputs, state: HybridState) -> Tensor:
    """Logits, float32 [B, V], of the tokens `inputs.ids`, all real; `state` is updated in its places.

    The state must have started and have room; the caller counts the tokens (`state.advance`).
    """
    cos, sin = angles(inputs.positions[:, None], inputs.frequencies)
    step = Step(cos, sin, inputs.past, inputs.valid, state)
    h = model.embedding(inputs.ids)
    first, *norms = model.norms()
    x = rms_norm(h, first.weight, first.eps, h.dtype)
    for layer, following in zip(model.layers, norms, strict=True):
        parts = partial(layer.attention.out_proj, layer.attention.step(layer.attention.in_proj(x), step))
        y = norm_residual(x, parts, layer.alpha, layer.beta, layer.post_norm.weight, layer.post_norm.eps)
        parts = layer.moe.parts(y)
        x = norm_residual(y, parts, layer.mlp_alpha, layer.mlp_beta, following.weight, following.eps)
    return model.head(x, out_dtype=torch.float32)


def unfused(model: "MiniMaxForCausalLM") -> str | None:
    """Why the model cannot take `decode_step`; None if it can."""
    if model.device.type != "cuda":
        return f"no GPU: the model is on {model.device}"
    if model.dtype != torch.bfloat16:
        return f"activations are {str(model.dtype).removeprefix('torch.')}, not bfloat16"
    if any(weight.device != model.device for weight in model.parameters()):
        return "weights are on several devices"
    if any(layer.moe.packed is None for layer in model.layers):
        return "experts are not held in the kernels' records"
    return None


def partial(linear: Linear, x_MK: Tensor) -> Tensor:
    """x W^T in float32, as parts [S, M, N] that add up to it."""
    split = getattr(linear.packed, "partial", None)
    return linear(x_MK, out_dtype=torch.float32)[None] if split is None else split(x_MK)
