"""Lightning attention: S_t = exp(-slope) S_{t-1} + k_t v_t^T, o_t = q_t S_t, per head, state in float32."""

import torch
from torch import Tensor
from torch.nn import functional as F

from minibble.runtime.kernels import reference_forced
from minibble.runtime.kernels.compiled import available
from minibble.runtime.kernels.device import multiprocessors
from minibble.runtime.kernels.lightning import blocked, reference
from minibble.runtime.kernels.norm import rms_norm

MAX_HEAD_DIM = 128  # a head's state lies in the registers of one block of threads
MAX_DECODE = 4096  # sequences, one counter each


def lightning(
    q_BTHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor, slope_H: Tensor, state_BHKK: Tensor, valid_BT: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Outputs [B, T, H, K] and the state after the last token [B, H, K, K].

    q, k, v are float32 after silu, with k and v zero where `valid_BT` is False. `state_BHKK` may be overwritten;
    use the one returned.
    """
    assert q_BTHK.shape == k_BTHK.shape == v_BTHK.shape and state_BHKK.dtype == torch.float32
    if reference_forced():
        return reference.lightning(q_BTHK, k_BTHK, v_BTHK, slope_H, state_BHKK, valid_BT)
    if q_BTHK.shape[1] == 1 and valid_BT is None and not torch.is_grad_enabled():
        o_BHK, state_BHKK = blocked.step(q_BTHK[:, 0], k_BTHK[:, 0], v_BTHK[:, 0], slope_H, state_BHKK)
        return o_BHK.unsqueeze(1), state_BHKK
    return blocked.prefill(q_BTHK, k_BTHK, v_BTHK, slope_H, state_BHKK, valid_BT)


def gated(
    projected_BTP: Tensor, slope_H: Tensor, state_BHKK: Tensor, norm_HK: Tensor, eps: float, valid_BT: Tensor | None
) -> tuple[Tensor, Tensor]:
    """rmsnorm(lightning(silu(q, k, v))) * sigmoid(gate), [B, T, HK], and the state after the last token.

    Arguments as for `gated_with_factors`.
    """
    o_BTN, factor_BT, state_BHKK = gated_with_factors(projected_BTP, slope_H, state_BHKK, norm_HK, eps, valid_BT)
    return scaled(o_BTN, factor_BT), state_BHKK


def scaled(o_BTN: Tensor, factor_BT: Tensor | None) -> Tensor:
    """Each token times its factor, if there are any."""
    return o_BTN if factor_BT is None else (o_BTN * factor_BT[..., None]).to(o_BTN.dtype)


def gated_with_factors(
    projected_BTP: Tensor, slope_H: Tensor, state_BHKK: Tensor, norm_HK: Tensor, eps: float, valid_BT: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """rmsnorm(lightning(silu(q, k, v))) * sigmoid(gate), [B, T, HK], factors [B, T], and the state at the end.

    Factors, float32, are the part of the norm that a product which follows can do as well; None where all is done.

    `projected_BTP` holds, head by head, q, k and v of every token, and then the gate: P = 4 HK. `norm_HK` is the
    norm's weight, over all heads. `state_BHKK` may be overwritten; use the one returned. The output is float32, but
    bfloat16 from the CUDA kernels, which take bfloat16 without gradients; they update a contiguous state in place.
    """
    B, T, P = projected_BTP.shape
    H, K = state_BHKK.shape[1:3]
    assert P == 4 * H * K
    if _fused(projected_BTP, slope_H, state_BHKK, norm_HK):
        state_BHKK = state_BHKK.contiguous()
        o_BTN, factor_BT = _gated_on_cuda(projected_BTP.contiguous(), slope_H, state_BHKK, norm_HK, eps, valid_BT)
        return o_BTN, factor_BT, state_BHKK
    one = T == 1 and valid_BT is None and not torch.is_grad_enabled()
    if one and not projected_BTP.is_cuda and available() and not reference_forced():
        from minibble.runtime.kernels.lightning import compiled

        state_BHKK = state_BHKK.contiguous()
        projected = projected_BTP.reshape(B, P).float()
        return compiled.decode(projected, torch.exp(-slope_H), state_BHKK, norm_HK, eps).unsqueeze(1), None, state_BHKK
    qkv = F.silu(projected_BTP[..., : 3 * H * K].float()).view(B, T, H, 3 * K)
    if valid_BT is not None:
        qkv = qkv * valid_BT[:, :, None, None]
    q, k, v = qkv.split(K, dim=-1)
    o_BTHK, state_BHKK = lightning(q, k, v, slope_H, state_BHKK, valid_BT)
    o = rms_norm(o_BTHK.reshape(B, T, H * K), norm_HK, eps)
    return o * torch.sigmoid(projected_BTP[..., 3 * H * K :].float()), None, state_BHKK


def _fused(projected_BTP: Tensor, slope_H: Tensor, state_BHKK: Tensor, norm_HK: Tensor) -> bool:
    """True where the CUDA kernels can do it."""
    if not projected_BTP.is_cuda or projected_BTP.dtype != torch.bfloat16 or reference_forced():
        return False
    inputs = (projected_BTP, slope_H, state_BHKK, norm_HK)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        return False
    return state_BHKK.shape[2] <= MAX_HEAD_DIM and projected_BTP.shape[1] > 0


def _gated_on_cuda(
    projected_BTP: Tensor, slope_H: Tensor, state_BHKK: Tensor, norm_HK: Tensor, eps: float, valid_BT: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    B, T, P = projected_BTP.shape
    if T == 1 and valid_BT is None and B <= MAX_DECODE:
        from minibble.runtime.kernels.lightning.decode import decode

        return decode(projected_BTP.view(B, P), slope_H, state_BHKK, norm_HK, eps).unsqueeze(1), None
    from minibble.runtime.kernels.lightning.prefill import prefill

    processors = multiprocessors(projected_BTP.device)
    return prefill(projected_BTP, slope_H, state_BHKK, norm_HK, eps, valid_BT, processors)
