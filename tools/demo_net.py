"""The training form of the built-in model: MiniMax's mathematics, dense and parallel over whole windows.

All experts are computed for every token (two matrix products instead of a loop), lightning attention runs in chunks
without a loop, and nothing is cached. What it learns is exported in the released model's tensor names; train_demo.py
then checks that the runtime's own model gives the same loss.

Shapes: B windows, T tokens, D hidden, H heads, K head dim, E experts, F expert hidden, C chunk, N chunks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHUNK = 128


@dataclass(frozen=True)
class NetConfig:
    """Sizes of the model; the defaults are the built-in model's."""

    vocab: int = 2048
    hidden: int = 256
    layers: int = 8
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    rotary_dim: int = 32
    rope_theta: float = 1e7
    experts: int = 5
    active: int = 2
    expert_hidden: int = 128
    eps: float = 1e-5

    @property
    def alpha(self) -> float:
        return (2 * self.layers) ** 0.25

    def softmax(self, layer: int) -> bool:
        return layer % 8 == 7

    def to_json(self) -> dict:
        """`config.json` in the original spelling."""
        scales = {
            f"layernorm_{part}_{name}": value
            for part in ("full_attention", "linear_attention", "mlp")
            for name, value in (("alpha", self.alpha), ("beta", 1.0))
        }
        return {
            "architectures": ["MiniMaxText01ForCausalLM"],
            "model_type": "minimax_text_01",
            "attention_dropout": 0.0,
            "attn_type_list": [int(self.softmax(layer)) for layer in range(self.layers)],
            "bos_token_id": 0,
            "eos_token_id": 0,
            "pad_token_id": 1,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "initializer_range": 0.02,
            "intermediate_size": self.expert_hidden,
            **scales,
            "max_position_embeddings": 8192,
            "num_attention_heads": self.heads,
            "num_experts_per_tok": self.active,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "num_local_experts": self.experts,
            "postnorm": True,
            "rms_norm_eps": self.eps,
            "rope_theta": self.rope_theta,
            "rotary_dim": self.rotary_dim,
            "router_aux_loss_coef": 0.01,
            "router_jitter_noise": 0.0,
            "shared_intermediate_size": 0,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "vocab_size": self.vocab,
        }


def matrix(rows: int, columns: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(rows, columns) * (0.5 / math.sqrt(columns)))


def slopes(heads: int, layer: int, layers: int) -> Tensor:
    """Decay rates [H] of a lightning layer; `heads` a power of two."""
    base = torch.tensor([2.0 ** (-8.0 * (h + 1) / heads) for h in range(heads)])
    return base * (1.0 - layer / (layers - 1) + 1e-5)


class Lightning(nn.Module):
    """Linear attention with decay: S_t = e^-s S_(t-1) + k_t v_t, o_t = q_t S_t."""

    def __init__(self, c: NetConfig, layer: int) -> None:
        super().__init__()
        self.c = c
        width = c.heads * c.head_dim
        self.qkv_proj, self.output_gate = matrix(3 * width, c.hidden), matrix(width, c.hidden)
        self.out_proj, self.norm = matrix(c.hidden, width), nn.Parameter(torch.ones(width))
        self.register_buffer("slope", slopes(c.heads, layer, c.layers), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        c, n = self.c, t // CHUNK
        qkv = F.silu(F.linear(x, self.qkv_proj)).view(b, n, CHUNK, c.heads, 3 * c.head_dim)
        q, k, v = qkv.permute(0, 3, 1, 2, 4).split(c.head_dim, -1)  # [B,H,N,C,K]
        s = self.slope.view(-1, 1, 1, 1)
        i = torch.arange(CHUNK, device=x.device, dtype=torch.float32)
        gap = i[:, None] - i
        within = torch.exp(-s * gap.clamp(min=0)) * (gap >= 0)  # [H,1,C,C]
        o = (q @ k.mT * within.to(q.dtype)) @ v
        to_end = torch.exp(-s * (CHUNK - 1 - i)[:, None])  # [H,1,C,1]
        added = (k * to_end.to(k.dtype)).mT @ v  # [B,H,N,K,K]
        m = torch.arange(n, device=x.device, dtype=torch.float32)
        before = (m[:, None] - 1 - m).clamp(min=0)
        carry = torch.exp(-s[:, 0] * CHUNK * before) * (m[:, None] > m)  # [H,N,N]
        state = torch.einsum("hnm,bhmkv->bhnkv", carry.to(added.dtype), added)
        o = o + (q * torch.exp(-s * (i + 1)[:, None]).to(q.dtype)) @ state
        o = o.permute(0, 2, 3, 1, 4).reshape(b, t, -1)
        o = F.rms_norm(o.float(), self.norm.shape, self.norm, 1e-6)
        return F.linear(torch.sigmoid(F.linear(x, self.output_gate)) * o, self.out_proj)


class Softmax(nn.Module):
    """Grouped-query attention, the first `rotary_dim` features of each head rotated."""

    def __init__(self, c: NetConfig) -> None:
        super().__init__()
        self.c = c
        self.q_proj, self.o_proj = (
            matrix(c.heads * c.head_dim, c.hidden),
            matrix(c.hidden, c.heads * c.head_dim),
        )
        self.k_proj, self.v_proj = (
            matrix(c.kv_heads * c.head_dim, c.hidden),
            matrix(c.kv_heads * c.head_dim, c.hidden),
        )

    def rotate(self, x: Tensor) -> Tensor:
        r = self.c.rotary_dim
        frequency = self.c.rope_theta ** (-torch.arange(0, r, 2, device=x.device) / r)
        angle = torch.arange(x.shape[2], device=x.device)[:, None] * frequency  # [T,r/2]
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        a, b, rest = x[..., : r // 2], x[..., r // 2 : r], x[..., r:]
        return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (
            F.linear(x, w).view(b, t, -1, self.c.head_dim).transpose(1, 2)
            for w in (self.q_proj, self.k_proj, self.v_proj)
        )
        o = F.scaled_dot_product_attention(self.rotate(q), self.rotate(k), v, is_causal=True, enable_gqa=True)
        return F.linear(o.transpose(1, 2).reshape(b, t, -1), self.o_proj)


class Experts(nn.Module):
    """Top-k of E experts, computed densely; expert e owns rows e·F to (e+1)·F of w1 and w3, columns of w2."""

    def __init__(self, c: NetConfig) -> None:
        super().__init__()
        self.c = c
        self.gate = matrix(c.experts, c.hidden)
        self.w1, self.w3 = (
            matrix(c.experts * c.expert_hidden, c.hidden),
            matrix(c.experts * c.expert_hidden, c.hidden),
        )
        self.w2 = nn.Parameter(torch.randn(c.hidden, c.experts * c.expert_hidden) * (0.5 / math.sqrt(c.expert_hidden)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The output, the load-balancing loss, and each expert's share of the routed pairs [E]."""
        c = self.c
        with torch.autocast(x.device.type, enabled=False):
            p = F.linear(x.float(), self.gate).softmax(-1)  # [B,T,E]
        top, index = p.topk(c.active, -1)
        chosen = torch.zeros_like(p).scatter(-1, index, 1.0)
        weight = p * chosen / top.sum(-1, keepdim=True)
        hidden = F.silu(F.linear(x, self.w1)) * F.linear(x, self.w3)
        hidden = hidden.unflatten(-1, (c.experts, -1)) * weight.to(hidden.dtype)[..., None]
        share = chosen.mean((0, 1)) / c.active
        aux = c.experts * (share.detach() * p.mean((0, 1))).sum()
        return F.linear(hidden.flatten(-2), self.w2), aux, share


class Layer(nn.Module):
    def __init__(self, c: NetConfig, index: int) -> None:
        super().__init__()
        self.alpha, self.eps = c.alpha, c.eps
        self.attention = Softmax(c) if c.softmax(index) else Lightning(c, index)
        self.moe = Experts(c)
        self.input_norm, self.post_norm = (
            nn.Parameter(torch.ones(c.hidden)),
            nn.Parameter(torch.ones(c.hidden)),
        )

    def forward(self, h: Tensor, dropout: float) -> tuple[Tensor, Tensor, Tensor]:
        x = F.rms_norm(h, self.input_norm.shape, self.input_norm, self.eps)
        h = self.alpha * x + F.dropout(self.attention(x), dropout, self.training)
        y = F.rms_norm(h, self.post_norm.shape, self.post_norm, self.eps)
        out, aux, share = self.moe(y)
        return self.alpha * y + F.dropout(out, dropout, self.training), aux, share


class DemoNet(nn.Module):
    """`forward(tokens [B,T])` -> logits float32 [B,T,V], mean load-balancing loss, expert shares [L,E]; T % 128 = 0."""

    def __init__(self, c: NetConfig, seed: int = 0, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.c, self.dropout = c, dropout
        self.embedding = nn.Parameter(torch.randn(c.vocab, c.hidden) * 0.05)
        self.layers = nn.ModuleList(Layer(c, index) for index in range(c.layers))
        self.norm = nn.Parameter(torch.ones(c.hidden))
        self.head = nn.Parameter(torch.randn(c.vocab, c.hidden) * 0.02)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = F.dropout(F.embedding(tokens, self.embedding), self.dropout, self.training)
        losses, shares = [], []
        for layer in self.layers:
            h, aux, share = layer(h, self.dropout)
            losses.append(aux)
            shares.append(share)
        x = F.rms_norm(h, self.norm.shape, self.norm, self.c.eps)
        return F.linear(x, self.head).float(), torch.stack(losses).mean(), torch.stack(shares)

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(released name, tensor view), experts one by one."""
        yield "model.embed_tokens.weight", self.embedding
        for index, layer in enumerate(self.layers):
            prefix = f"model.layers.{index}"
            yield f"{prefix}.input_layernorm.weight", layer.input_norm
            yield f"{prefix}.post_attention_layernorm.weight", layer.post_norm
            for name, weight in layer.attention.named_parameters():
                yield f"{prefix}.self_attn.{name}.weight", weight
            yield f"{prefix}.block_sparse_moe.gate.weight", layer.moe.gate
            for e in range(self.c.experts):
                own = slice(e * self.c.expert_hidden, (e + 1) * self.c.expert_hidden)
                parts = {"w1": layer.moe.w1[own], "w2": layer.moe.w2[:, own], "w3": layer.moe.w3[own]}
                for name, weight in parts.items():
                    yield f"{prefix}.block_sparse_moe.experts.{e}.{name}.weight", weight
        yield "model.norm.weight", self.norm
        yield "lm_head.weight", self.head
