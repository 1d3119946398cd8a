"""How far a 4-bit matrix is from its source."""

from math import isfinite, prod

import torch
from torch import Tensor

from minibble.quantize.formats import Format
from minibble.quantize.nf4_math import chunks, decode_absmax, level_values
from minibble.quantize.parallel import spread
from minibble.quantize.tensors import QuantizedTensor


def all_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite: both survive into the minimum or the maximum, in one pass."""
    if tensor.numel() == 0:
        return True
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low) & torch.isfinite(high))


def finite_scales(q: QuantizedTensor) -> bool:
    """Whether the matrix that `q` was encoded from was finite: NaN and infinity reach its block's absmax, and from
    there the mean that double quantization stores."""
    if q.nested_offset is not None:
        return isfinite(q.nested_offset)
    return bool(torch.isfinite(q.absmax).all())


def relative_error(format: Format, weight: Tensor, q: QuantizedTensor) -> float:
    """||W - Q||^2 / ||W||^2 of `q` against its source `weight` [N, K], on their device; 0 for an all-zero W.

    Rounded to 6 significant digits, so that the order of summation does not show in files.
    """
    flat = weight.reshape(-1)

    def measure(chunk: tuple[int, QuantizedTensor]) -> Tensor:
        start, part = chunk
        W = flat[start : start + prod(part.shape)]
        return torch.stack((_energy(_difference(format, W, part)), _energy(W)))

    sums = spread(measure, list(chunks(q)), weight.device)
    difference, energy = torch.stack(sums).sum(dim=0).tolist()
    return float(f"{difference / energy:.6g}") if energy else 0.0


def _difference(format: Format, W: Tensor, part: QuantizedTensor) -> Tensor:
    """W - Q of a chunk, float32; for whole blocks in one pass over the levels, without the decoded matrix."""
    if W.numel() % part.block_size:
        return W.float() - format.decode(part, torch.float32).reshape(-1)
    levels = level_values(part.codes, part.levels).view(-1, part.block_size)
    blocks = W.float().view(-1, part.block_size)
    return torch.addcmul(blocks, levels, decode_absmax(part)[:, None], value=-1)


def _energy(x: Tensor) -> Tensor:
    if x.device.type == "cpu":
        return x.float().square().sum(dtype=torch.float64)
    return torch.linalg.vector_norm(x, dtype=torch.float64).square()
