"""y = x W^T through a float32 copy of W."""

import torch
from torch import Tensor

from minibble.quantize.nf4_math import decode
from minibble.quantize.tensors import QuantizedTensor


def linear(x: Tensor, parts: list[QuantizedTensor]) -> Tensor:
    """x [..., K] times the rows of all `parts`, float32 [..., N]."""
    weight = torch.cat([decode(q) for q in parts])
    return torch.nn.functional.linear(x.float(), weight)
