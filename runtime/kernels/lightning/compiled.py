"""One token of every sequence on the CPU, from the projections to the gated output, as one compiled loop."""

import numpy as np
import torch
from torch import Tensor

from minibble.runtime.kernels.compiled import compiled


def decode(projected_BP: Tensor, decay_H: Tensor, state_BHKK: Tensor, norm_HK: Tensor, eps: float) -> Tensor:
    """See `minibble.runtime.kernels.lightning.decode`; `decay_H` is exp(-slope), all are float32 and contiguous."""
    out = torch.empty(projected_BP.shape[0], norm_HK.shape[0])
    arrays = (x.detach().numpy() for x in (projected_BP, decay_H, state_BHKK, norm_HK, out))
    _decode(*arrays, eps)
    return out


@compiled
def _decode(projected, decay, state, norm, out, eps):  # type: ignore[no-untyped-def]
    B, H, K, _ = state.shape
    qkv, o = np.empty(3 * K, dtype=np.float32), np.empty(K, dtype=np.float32)
    one = np.float32(1)
    for b in range(B):
        squares = 0.0
        for h in range(H):
            for i in range(3 * K):
                x = projected[b, h * 3 * K + i]
                qkv[i] = x / (one + np.exp(-x))
            o[:] = np.float32(0)
            d = decay[h]
            for i in range(K):
                q, k = qkv[i], qkv[K + i]
                for j in range(K):
                    s = d * state[b, h, i, j] + k * qkv[2 * K + j]
                    state[b, h, i, j] = s
                    o[j] += q * s
            for j in range(K):
                out[b, h * K + j] = o[j]
                squares += o[j] * o[j]
        scale = np.float32(1.0 / np.sqrt(squares / (H * K) + eps))
        for n in range(H * K):
            gate = projected[b, 3 * H * K + n]
            out[b, n] = out[b, n] * scale * norm[n] / (one + np.exp(-gate))
