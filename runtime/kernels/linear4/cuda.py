"""4-bit products on CUDA: decode the matrix into a workspace, multiply with cuBLAS."""

import torch
from torch import Tensor

from minibble.runtime.kernels.linear4.decode import decode_into
from minibble.runtime.kernels.linear4.stored import StoredParts


class PackedLinear(StoredParts):
    """A matrix resident as it is stored, second-level scales included."""

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
