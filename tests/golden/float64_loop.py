"""MiniMax-Text-01 in float64, one token after another: the independent truth the runtime is compared with.

Written from the published formulas and nothing else: no chunks, no masks, no batches, no cache classes. A
token goes through all layers before the next one is looked at; a lightning layer carries its state S, a
softmax layer the list of its keys and values. Weights come by their original names
(`model.layers.N.self_attn.qkv_proj.weight`).

Shape key: D hidden, H heads, G KV heads, K head dim, E experts, T tokens, V vocab.

`MUTATIONS` are mistakes that ports have made or could make. `Loop(..., mutation=name)` makes exactly that
one, so that a test can show that its bound would notice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

MUTATIONS = {
    "full_head_rope": "rotates all of the head instead of the first rotary_dim features",
    "interleaved_rope": "pairs neighbouring features instead of the two halves of the rotated part",
    "bf16_decay": "rounds the decays exp(-s) to bfloat16",
    "bf16_slope": "rounds the slopes s to bfloat16",
    "no_attention_alpha": "leaves the alpha of the attention residual at 1",
    "no_mlp_alpha": "leaves the alpha of the expert residual at 1",
    "raw_residual": "carries the residual from before the norm instead of the normed input",
    "no_silu": "forgets the silu on the lightning q, k, v",
    "qkv_in_thirds": "splits q, k, v as three blocks of all heads instead of inside every head",
    "decay_after": "reads the state before the current token's update",
    "same_slope_every_layer": "forgets the factor of the layer in the slopes",
    "no_renormalise": "uses the two largest router probabilities without renormalising them",
    "scaled_lightning": "divides lightning's q by sqrt(head_dim)",
    "lightning_eps": "uses rms_norm_eps in lightning's own norm, which has 1e-6",
    "gate_before_norm": "multiplies by the output gate before lightning's norm",
    "head_order": "gives every query head the wrong KV head (interleaved instead of grouped)",
}

LIGHTNING_NORM_EPS = 1e-6


def slopes(num_heads: int, model_type: str) -> list[float]:
    """Slopes of the heads in a layer with factor 1.

    2^(-8(h+1)/H) wherever H is a power of two, as in the release. For other H the two codes differ: the
    original one follows ALiBi (the slopes of the next lower power, then every second one of the next
    higher), transformers' port (`minimax`) keeps the formula, and models trained with it need that.
    """
    if model_type == "minimax" or num_heads & (num_heads - 1) == 0:
        return [2.0 ** (-8.0 * (head + 1) / num_heads) for head in range(num_heads)]
    lower = 2 ** int(math.log2(num_heads))
    return slopes(lower, model_type) + slopes(2 * lower, model_type)[0::2][: num_heads - lower]


def rmsnorm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x / torch.sqrt((x * x).mean() + eps)


def silu(x: Tensor) -> Tensor:
    return x / (1.0 + torch.exp(-x))


def rotate(head_k: Tensor, position: int, rotary_dim: int, theta: float, interleaved: bool = False) -> Tensor:
    """Rotate the first `rotary_dim` features of one head [K]; the rest passes through."""
    out = head_k.clone()
    half = rotary_dim // 2
    for i in range(half):
        angle = position * theta ** (-2.0 * i / rotary_dim)
        cos, sin = math.cos(angle), math.sin(angle)
        first, second = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
        a, b = head_k[first], head_k[second]
        out[first] = a * cos - b * sin
        out[second] = b * cos + a * sin
    return out


class Loop:
    """The model as a recurrence: `step(token)` returns the float64 logits [V] after that token.

    `config` is anything with the attributes of `ModelConfig`. `closest_gap` is the smallest difference seen
    between the router logits of the last expert taken and the first one left: where it is tiny, float32 may
    rightly choose differently.
    """

    def __init__(self, config: Any, weights: Mapping[str, Tensor], mutation: str | None = None) -> None:
        if mutation is not None and mutation not in MUTATIONS:
            raise ValueError(f"unknown mutation {mutation!r}")
        self.config = config
        self.mutation = mutation
        self.weights = {name: tensor.detach().to(torch.float64) for name, tensor in weights.items()}
        self.closest_gap = math.inf
        self.reset()

    def reset(self) -> None:
        c = self.config
        self.position = 0
        self.state: dict[int, Tensor] = {
            layer: torch.zeros(c.num_attention_heads, c.head_dim, c.head_dim, dtype=torch.float64)
            for layer in range(c.num_hidden_layers)
        }
        self.keys: dict[int, list[Tensor]] = {layer: [] for layer in range(c.num_hidden_layers)}
        self.values: dict[int, list[Tensor]] = {layer: [] for layer in range(c.num_hidden_layers)}

    def run(self, tokens: Sequence[int]) -> Tensor:
        """Float64 logits [T, V] of one prompt from an empty state."""
        self.reset()
        return torch.stack([self.step(int(token)) for token in tokens])

    def step(self, token: int) -> Tensor:
        c = self.config
        h = self.weights["model.embed_tokens.weight"][token]
        for layer in range(c.num_hidden_layers):
            h = self._layer(layer, h)
        self.position += 1
        return self.weights["lm_head.weight"] @ rmsnorm(h, self.weights["model.norm.weight"], c.rms_norm_eps)

    def _layer(self, layer: int, h: Tensor) -> Tensor:
        c, weights, prefix = self.config, self.weights, f"model.layers.{layer}."
        lightning = c.attention[layer] == "lightning"
        alpha, beta = (c.lightning_alpha, c.lightning_beta) if lightning else (c.softmax_alpha, c.softmax_beta)
        mlp_alpha = c.mlp_alpha
        if self.mutation == "no_attention_alpha":
            alpha = 1.0
        if self.mutation == "no_mlp_alpha":
            mlp_alpha = 1.0
        x = rmsnorm(h, weights[prefix + "input_layernorm.weight"], c.rms_norm_eps)
        attention = self._lightning(layer, x) if lightning else self._softmax(layer, x)
        h = alpha * (h if self.mutation == "raw_residual" else x) + beta * attention
        y = rmsnorm(h, weights[prefix + "post_attention_layernorm.weight"], c.rms_norm_eps)
        return mlp_alpha * (h if self.mutation == "raw_residual" else y) + c.mlp_beta * self._experts(layer, y)

    def decay(self, layer: int) -> Tensor:
        """exp(-s) of every head [H]: s = slope of the head * (1 - l/(L-1) + 1e-5)."""
        c = self.config
        factor = 1.0 - layer / (c.num_hidden_layers - 1) + 1e-5
        if self.mutation == "same_slope_every_layer":
            factor = 1.0
        s = torch.tensor([slope * factor for slope in slopes(c.num_attention_heads, c.model_type)], dtype=torch.float64)
        if self.mutation == "bf16_slope":
            s = s.to(torch.bfloat16).double()
        decay = torch.exp(-s)
        if self.mutation == "bf16_decay":
            decay = decay.to(torch.bfloat16).double()
        return decay

    def _lightning(self, layer: int, x: Tensor) -> Tensor:
        c, prefix = self.config, f"model.layers.{layer}.self_attn."
        H, K = c.num_attention_heads, c.head_dim
        qkv = self.weights[prefix + "qkv_proj.weight"] @ x
        if self.mutation != "no_silu":
            qkv = silu(qkv)
        q, k, v = qkv.view(3, H, K) if self.mutation == "qkv_in_thirds" else qkv.view(H, 3, K).unbind(1)
        if self.mutation == "scaled_lightning":
            q = q / math.sqrt(K)
        before = self.state[layer]
        S = self.decay(layer)[:, None, None] * before + k[:, :, None] * v[:, None, :]
        read = before if self.mutation == "decay_after" else S
        o = (q[:, :, None] * read).sum(1).reshape(H * K)
        self.state[layer] = S
        gate = 1.0 / (1.0 + torch.exp(-(self.weights[prefix + "output_gate.weight"] @ x)))
        norm = self.weights[prefix + "norm.weight"]
        eps = c.rms_norm_eps if self.mutation == "lightning_eps" else LIGHTNING_NORM_EPS
        gated = rmsnorm(gate * o, norm, eps) if self.mutation == "gate_before_norm" else gate * rmsnorm(o, norm, eps)
        return self.weights[prefix + "out_proj.weight"] @ gated

    def _softmax(self, layer: int, x: Tensor) -> Tensor:
        c, prefix = self.config, f"model.layers.{layer}.self_attn."
        H, G, K = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        rotary_dim = K if self.mutation == "full_head_rope" else c.rotary_dim
        q = (self.weights[prefix + "q_proj.weight"] @ x).view(H, K)
        k = (self.weights[prefix + "k_proj.weight"] @ x).view(G, K)
        v = (self.weights[prefix + "v_proj.weight"] @ x).view(G, K)
        rope = (self.position, rotary_dim, c.rope_theta, self.mutation == "interleaved_rope")
        self.keys[layer].append(torch.stack([rotate(head, *rope) for head in k]))
        self.values[layer].append(v)
        keys, values = torch.stack(self.keys[layer]), torch.stack(self.values[layer])  # [T, G, K]
        out = []
        for head in range(H):
            group = head % G if self.mutation == "head_order" else head // (H // G)
            scores = keys[:, group] @ rotate(q[head], *rope) / math.sqrt(K)
            weights = torch.exp(scores - scores.max())
            out.append((weights / weights.sum()) @ values[:, group])
        return self.weights[prefix + "o_proj.weight"] @ torch.cat(out)

    def _experts(self, layer: int, y: Tensor) -> Tensor:
        c, prefix = self.config, f"model.layers.{layer}.block_sparse_moe."
        logits = self.weights[prefix + "gate.weight"] @ y
        p = torch.exp(logits - logits.max())
        p = p / p.sum()
        order = torch.argsort(p, descending=True)
        taken = order[: c.experts_per_token]
        if c.num_experts > c.experts_per_token:
            gap = float(logits[taken[-1]] - logits[order[c.experts_per_token]])
            self.closest_gap = min(self.closest_gap, gap)
        total = 1.0 if self.mutation == "no_renormalise" else p[taken].sum()
        out = torch.zeros_like(y)
        for e in taken.tolist():
            expert = f"{prefix}experts.{e}."
            gate = silu(self.weights[expert + "w1.weight"] @ y)
            up = self.weights[expert + "w3.weight"] @ y
            out = out + (p[e] / total) * (self.weights[expert + "w2.weight"] @ (gate * up))
        return out


def logits(config: Any, weights: Mapping[str, Tensor], tokens: Sequence[int], mutation: str | None = None) -> Tensor:
    """Float64 logits [T, V] of one prompt."""
    return Loop(config, weights, mutation).run(tokens)
