"""The two attentions of the model: lightning (linear, with a state) and softmax (with a key-value cache).

Array axes: B batch, T tokens, L tokens with the past, D hidden, H heads, G key-value heads, K head dim,
R rotated features. Both project through one matrix whose rows are their inputs' projections, one under the other.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import CausalBias, causal_lower_right

from minibble.quantize.config import ModelConfig
from minibble.runtime.kernels import reference_forced
from minibble.runtime.kernels.attention import decode_attention
from minibble.runtime.kernels.lightning import gated, gated_with_factors, scaled
from minibble.runtime.kernels.rope_cache import angles, rope_cache
from minibble.runtime.layers import Linear, RMSNorm
from minibble.runtime.masks import causal
from minibble.runtime.pipeline import hop
from minibble.runtime.state import HybridState, empty_lightning_state

LIGHTNING_NORM_EPS = 1e-6  # fixed in the original code, whatever the config says of the other norms


@dataclass(frozen=True)
class Context:
    """What all layers of one forward share: rotations, masks and the state of the sequences."""

    cos: Tensor  # float32 [B or 1, T, R / 2]
    sin: Tensor
    valid_BT: Tensor | None  # False at padding among the new tokens; None where there is none
    mask: Tensor | None  # bool [B, 1, T, L], what each token may see; None where causality says it all
    state: HybridState | None
    starts: tuple[int, ...] | None = None  # instead of the mask: where each sequence begins after padding on the left

    def on(self, device: torch.device) -> "Context":
        """The same on `device`."""
        if self.cos.device == device:
            return self
        valid, mask = (None if x is None else hop(x, device) for x in (self.valid_BT, self.mask))
        return replace(self, cos=hop(self.cos, device), sin=hop(self.sin, device), valid_BT=valid, mask=mask)


@dataclass(frozen=True)
class Step:
    """What all layers share when every sequence gets one token, all of it on the device.

    The state's caches have a place for the token, which is written to.
    """

    cos: Tensor  # float32 [B, 1, R / 2]
    sin: Tensor
    past: Tensor  # int32 [1], tokens before this one, padding included
    valid_BL: Tensor | None  # bool, False at padding, for all places of the caches
    state: HybridState


def geometric_slopes(heads: int) -> list[float]:
    """2^(-8 h / H) for heads h from 1 to H."""
    return [2.0 ** (-8 * h / heads) for h in range(1, heads + 1)]


def alibi_slopes(heads: int) -> list[float]:
    """The slopes of ALiBi (Press et al., 2022): geometric if `heads` is a power of two.

    For other counts: those of the next lower power of two, then every other one of the next higher.
    """
    lower = 2 ** math.floor(math.log2(heads))
    return geometric_slopes(lower) + geometric_slopes(2 * lower)[::2][: heads - lower]


def decay_slopes(config: ModelConfig, layer: int) -> Tensor:
    """Slope of each head's exponential decay in `layer`, float32 [H]."""
    rule = alibi_slopes if config.slopes == "alibi" else geometric_slopes
    depth = 1 - layer / max(config.num_hidden_layers - 1, 1) + 1e-5
    return torch.tensor([slope * depth for slope in rule(config.num_attention_heads)], dtype=torch.float32)


class LightningAttention(nn.Module):
    """out(sigmoid(gate x) * rmsnorm(lightning(silu(qkv x)))), no positions, no scaling by the head dim."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.config, self.layer = config, layer
        HK = config.num_attention_heads * config.head_dim
        self.in_proj = Linear(4 * HK, config.hidden_size)  # qkv_proj, output_gate
        self.out_proj = Linear(config.hidden_size, HK)
        self.norm = RMSNorm(HK, LIGHTNING_NORM_EPS)
        self.slopes = decay_slopes(config, layer)

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        o, factor_BT = self._mix(self.in_proj(x_BTD), context)
        return self.out_proj(o, factors=factor_BT)

    def mix(self, projected: Tensor, context: Context) -> Tensor:
        """What goes into `out_proj`, [B, T, H*K], from what came out of `in_proj`."""
        return scaled(*self._mix(projected, context))

    def _mix(self, projected: Tensor, context: Context) -> tuple[Tensor, Tensor | None]:
        """The same but for factors, float32 [B, T], which a product can apply just as well; None for 1."""
        o, factor_BT, state = gated_with_factors(
            projected, self._slopes_on(projected), self._state(projected, context),
            self.norm.weight, self.norm.eps, context.valid_BT,
        )  # fmt: skip
        if context.state is not None:
            context.state.set_lightning_state(self.layer, state)
        return o.to(projected.dtype), factor_BT

    def step(self, projected_BP: Tensor, step: Step) -> Tensor:
        """`mix` for one real token a sequence, [B, H*K]; the state is updated in its place."""
        held = step.state.lightning[self.layer]
        o, state = gated(
            projected_BP[:, None], self._slopes_on(projected_BP), held, self.norm.weight, self.norm.eps, None
        )
        assert state.data_ptr() == held.data_ptr(), "a step must update the lightning state in its place"
        return o.view(projected_BP.shape[0], -1).to(projected_BP.dtype)

    def _slopes_on(self, x: Tensor) -> Tensor:
        # No buffer: those follow the model's dtype, and in bf16 decays of nearly 1 become 1.
        if self.slopes.device != x.device:
            self.slopes = self.slopes.to(x.device)
        return self.slopes

    def _state(self, x_BTD: Tensor, context: Context) -> Tensor:
        if context.state is not None:
            return context.state.lightning_state(self.layer, x_BTD.shape[0], x_BTD.device)
        return empty_lightning_state(self.config, x_BTD.shape[0], x_BTD.device)


class SoftmaxAttention(nn.Module):
    """Causal grouped-query attention over all tokens; the first `rotary_dim` features of a head are rotated."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        HK, GK = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.in_proj = Linear(HK + 2 * GK, config.hidden_size)  # q_proj, k_proj, v_proj
        self.out_proj = Linear(config.hidden_size, HK)

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        return self.out_proj(self.mix(self.in_proj(x_BTD), context))

    def mix(self, projected: Tensor, context: Context) -> Tensor:
        """What goes into `out_proj`, [B, T, H*K], from what came out of `in_proj`."""
        B, T, _ = projected.shape
        fused = projected.is_cuda and not torch.is_grad_enabled() and not reference_forced()
        q, k, v = (self._heads_at_once if fused else self._heads)(projected, context)
        if context.starts is not None:
            o = attend_from(context.starts, q, k, v)
        else:
            o = attend(q, k, v, context.mask)
        return o.transpose(1, 2).reshape(B, T, self.heads * self.head_dim)

    def _heads(self, projected: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, H, T, K] of the new tokens, keys and values [B, G, L, K] of all so far."""
        B, T, _ = projected.shape
        heads = projected.view(B, T, self.heads + 2 * self.kv_heads, self.head_dim).transpose(1, 2)
        rotated = self.heads + self.kv_heads
        qk, v = heads[:, :rotated], heads[:, rotated:]
        qk = rotate(qk, context.cos, context.sin)
        q, k = qk[:, : self.heads], qk[:, self.heads :]
        if context.state is not None:
            k, v = context.state.append(self.layer, k, v)
        return q, k, v

    def _heads_at_once(self, projected: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        """The same in one launch, which writes keys and values to their places."""
        (B, T, _), past = projected.shape, 0
        if context.state is None:
            k, v = projected.new_empty(2, B, self.kv_heads, T, self.head_dim)
        else:
            past = context.state.length
            k, v = context.state.places(self.layer, T, projected.new_empty(B, self.kv_heads, 0, self.head_dim))
        cos, sin = (x.expand(B, T, -1).contiguous() for x in (context.cos, context.sin))
        place = torch.full((1,), past, dtype=torch.int32, device=projected.device)
        q = rope_cache(projected, cos, sin, k, v, place).transpose(1, 2)
        return q, k[:, :, : past + T], v[:, :, : past + T]

    def step(self, projected_BP: Tensor, step: Step) -> Tensor:
        """`mix` for one token a sequence, [B, H*K]; its key and value are written into the cache."""
        k, v = step.state.keys[self.layer], step.state.values[self.layer]
        q_BTHK = rope_cache(projected_BP[:, None], step.cos, step.sin, k, v, step.past)
        return decode_attention(q_BTHK[:, 0], k, v, step.past, step.valid_BL).flatten(1)


def attend(q_BHTK: Tensor, k_BGLK: Tensor, v_BGLK: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax attention [B, H, T, K], H/G query heads to a key-value head; without a mask the last T of L tokens are
    causal."""
    T, L, groups = q_BHTK.shape[2], k_BGLK.shape[2], q_BHTK.shape[1] // k_BGLK.shape[1]
    if T == 1:
        q = q_BHTK.squeeze(2).unflatten(1, (-1, groups)) * q_BHTK.shape[-1] ** -0.5
        scores = torch.matmul(q, k_BGLK.transpose(-1, -2)).float()
        scores = scores if mask is None else scores.masked_fill(~mask, float("-inf"))
        return torch.matmul(scores.softmax(-1).to(q.dtype), v_BGLK).flatten(1, 2).unsqueeze(2)
    half = q_BHTK.dtype in (torch.bfloat16, torch.float16)
    if mask is None and T < L:
        # FlashAttention knows causality that ends in the lower right corner; all others need it spelled out.
        mask = causal_lower_right(T, L) if q_BHTK.is_cuda and half else causal(T, L, q_BHTK.device)[None, None]
    backends: AbstractContextManager[None] = nullcontext()
    if q_BHTK.is_cuda:
        # Without cuDNN: with it among the choices a decode step of two layers took 63 ms, 2 of them on the GPU, it
        # seems because it plans anew for every length. Of the others only math takes a mask with groups.
        backends = sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
        if mask is not None and not isinstance(mask, CausalBias) and groups > 1:
            k_BGLK, v_BGLK, groups = k_BGLK.repeat_interleave(groups, 1), v_BGLK.repeat_interleave(groups, 1), 1
    with backends:
        return F.scaled_dot_product_attention(
            q_BHTK, k_BGLK, v_BGLK, attn_mask=mask, is_causal=mask is None, enable_gqa=groups > 1
        )


def attend_from(starts: tuple[int, ...], q_BHTK: Tensor, k_BGLK: Tensor, v_BGLK: Tensor) -> Tensor:
    """As `attend`, each sequence from its start on, without a mask; 0 for the tokens before.

    FlashAttention takes no mask, and the others want the keys and values repeated for every query head.
    """
    past = k_BGLK.shape[2] - q_BHTK.shape[2]
    o_BHTK = torch.zeros_like(q_BHTK)
    for row, start in enumerate(starts):
        one, real = slice(row, row + 1), slice(max(start - past, 0), None)
        q = q_BHTK[one, :, real]
        if q.shape[2]:
            o_BHTK[one, :, real] = attend(q, k_BGLK[one, :, start:], v_BGLK[one, :, start:], None)
    return o_BHTK


def frequencies(config: ModelConfig, device: torch.device) -> Tensor:
    """By how much each rotated pair of features turns from one token to the next, float64 [R / 2]."""
    half = torch.arange(0, config.rotary_dim, 2, dtype=torch.float64, device=device)
    return config.rope_theta ** (-half / config.rotary_dim)


def rotations(config: ModelConfig, positions_BT: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of each position's angles, float32 [B, T, R / 2]; exact at a million tokens."""
    return angles(positions_BT, frequencies(config, positions_BT.device))


def rotate(x_BHTK: Tensor, cos_BTR: Tensor, sin_BTR: Tensor) -> Tensor:
    """Rotary embedding of the first features, as many as there are cos and sin; feature i is paired with i + R/2.

    The rest is unchanged.
    """
    half = cos_BTR.shape[-1]
    first, second, kept = x_BHTK.split((half, half, x_BHTK.shape[-1] - 2 * half), dim=-1)
    first, second, cos, sin = first.float(), second.float(), cos_BTR[:, None], sin_BTR[:, None]
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return torch.cat((turned.to(x_BHTK.dtype), kept), dim=-1)
