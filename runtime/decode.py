"""One token of every sequence through the whole model, in the fewest launches and without asking the device anything.

Between the sublayers travel the normed activations x [B, D] and what is to be added to them in float32, in S parts
[S, B, D] that the next norm sums: no sublayer writes a residual. Where layers are on several devices the step is made
of stretches, each on one device, with a pause after it in which activations go to the next; so it is where experts
have to come from elsewhere. Array axes: B batch, D hidden, L places of the cache, R rotated pairs, V vocabulary.
"""

from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minibble.runtime.attention import Step, frequencies
from minibble.runtime.kernels.norm import norm_residual, rms_norm
from minibble.runtime.kernels.rope_cache import angles
from minibble.runtime.layers import Embedding, Linear
from minibble.runtime.pipeline import Hop, Pause
from minibble.runtime.state import HybridState

if TYPE_CHECKING:
    from minibble.runtime.model import MiniMaxForCausalLM

Stretches = Generator[Pause, None, Tensor]


@dataclass(frozen=True)
class Places:
    """What all layers of a device read of the tokens."""

    positions: Tensor  # int64 [B], real tokens before this one
    past: Tensor  # int32 [1], places of the cache before this one's
    valid: Tensor  # bool [B, L], False at padding
    frequencies: Tensor  # float64 [R]


@dataclass(frozen=True)
class Inputs:
    """What changes from token to token, in places of its own on each device; ids, int64 [B], on the first.

    If the table is in host memory, what the embedding says of them is there as well, [B, D].
    """

    ids: Tensor
    on: dict[torch.device, Places]
    embedding: Embedding
    embedded: Tensor | None

    @classmethod
    def empty(cls, model: "MiniMaxForCausalLM", batch: int, capacity: int) -> "Inputs":
        """Room for `batch` sequences over caches of `capacity` places."""
        places = {
            device: Places(
                positions=torch.zeros(batch, dtype=torch.int64, device=device),
                past=torch.zeros(1, dtype=torch.int32, device=device),
                valid=torch.ones(batch, capacity, dtype=torch.bool, device=device),
                frequencies=frequencies(model.minibble, device),
            )
            for device in model.devices
        }
        embedded: Tensor | None = None
        if model.embedding.elsewhere:
            embedded = torch.zeros(batch, model.minibble.hidden_size, dtype=model.dtype, device=model.device)
        ids = torch.zeros(batch, dtype=torch.int64, device=model.device)
        return cls(ids, places, model.embedding, embedded)

    def put(self, ids_B: Tensor, past: int, positions_B: Tensor | None = None) -> None:
        """The new tokens after `past` places of the caches; their positions are `past` if not given."""
        self.ids.copy_(ids_B)
        if self.embedded is not None:
            self.embedded.copy_(self.embedding(ids_B))
        for places in self.on.values():
            places.past.fill_(past)
            if positions_B is None:
                places.positions.fill_(past)
            else:
                places.positions.copy_(positions_B)


def decode_step(model: "MiniMaxForCausalLM", inputs: Inputs, state: HybridState) -> Tensor:
    """Logits, float32 [B, V], of the tokens `inputs.ids`, all real; `state` is updated in its places.

    The state must have started and have room; the caller counts the tokens (`state.advance`).
    """
    steps = stretches(model, inputs, state)
    with model.using_experts():
        try:
            while True:
                next(steps).run()
        except StopIteration as end:
            logits: Tensor = end.value
            return logits


def stretches(model: "MiniMaxForCausalLM", inputs: Inputs, state: HybridState) -> Stretches:
    """`decode_step`, but whoever goes through it runs the pauses."""
    h = model.embedding(inputs.ids) if inputs.embedded is None else inputs.embedded
    first, *norms = model.norms()
    x = rms_norm(h, first.weight_on(h.device), first.eps, h.dtype)
    step = _step(inputs.on[x.device], state)
    for layer, following in zip(model.layers, norms, strict=True):
        if layer.device != x.device:
            hop = Hop(x, layer.device)
            yield hop
            x, step = hop.arrived, _step(inputs.on[layer.device], state)
        parts = partial(layer.attention.out_proj, layer.attention.step(layer.attention.in_proj(x), step))
        y = norm_residual(x, parts, layer.alpha, layer.beta, layer.post_norm.weight, layer.post_norm.eps)
        ids, weights = layer.moe.route(y)
        fetch = layer.moe.fetch(y, ids, weights)
        if fetch is not None:
            yield fetch
        parts, weight = layer.moe.parts(y, ids, weights, fetch), following.weight_on(x.device)
        x = norm_residual(y, parts, layer.mlp_alpha, layer.mlp_beta, weight, following.eps)
    return model.head(x, out_dtype=torch.float32)


def _step(places: Places, state: HybridState) -> Step:
    cos, sin = angles(places.positions[:, None], places.frequencies)
    return Step(cos, sin, places.past, places.valid, state)


def unfused(model: "MiniMaxForCausalLM") -> str | None:
    """Why the model cannot take `decode_step`; None if it can."""
    elsewhere = [device for device in model.devices if device.type != "cuda"]
    if elsewhere:
        return f"no GPU: the model is on {elsewhere[0]}"
    if model.dtype != torch.bfloat16:
        return f"activations are {str(model.dtype).removeprefix('torch.')}, not bfloat16"
    if any(weight.device != layer.device for layer in model.layers for weight in layer.parameters()):
        return "the weights of a layer are on several devices"
    if any(layer.moe.packed is None for layer in model.layers):
        return "experts are not held in the kernels' records"
    return None


def partial(linear: Linear, x_MK: Tensor) -> Tensor:
    """x W^T in float32, as parts [S, M, N] that add up to it."""
    split = getattr(linear.packed, "partial", None)
    return linear(x_MK, out_dtype=torch.float32)[None] if split is None else split(x_MK)
