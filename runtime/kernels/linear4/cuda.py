"""NF4 products on CUDA: decode the matrix into a workspace, multiply with cuBLAS."""

import torch
from torch import Tensor

from minibble.quantize.tensors import QuantizedTensor
from minibble.runtime.kernels.linear4.decode import decode_into


class PackedLinear:
    """The rows of one or several NF4 matrices of one width, resident as they are stored."""

    def __init__(self, parts: list[QuantizedTensor]):
        self.parts = parts
        self.shape = (sum(q.shape[0] for q in parts), parts[0].shape[1])

    @property
    def nbytes(self) -> int:
        return sum(q.nbytes for q in self.parts)

    def __call__(self, x: Tensor, out_dtype: torch.dtype) -> Tensor:
        weight = self.decode(x.dtype)
        if out_dtype == x.dtype:
            return torch.nn.functional.linear(x, weight)
        return torch.mm(x.reshape(-1, x.shape[-1]), weight.t(), out_dtype=out_dtype).unflatten(0, x.shape[:-1])

    def decode(self, dtype: torch.dtype) -> Tensor:
        """The matrix [N, K] in `dtype`."""
        weight = torch.empty(self.shape, dtype=dtype, device=self.parts[0].device)
        row = 0
        for q in self.parts:
            decode_into(weight[row : row + q.shape[0]], q)
            row += q.shape[0]
        return weight
