"""4-bit matrices held just as they are stored, for the paths that decode before they multiply."""

from minibble.quantize.tensors import QuantizedTensor


class StoredParts:
    """The rows of one or several 4-bit matrices of one width, one under the other: [N, K]."""

    def __init__(self, parts: list[QuantizedTensor]):
        self.parts = parts
        self.shape = (sum(q.shape[0] for q in parts), parts[0].shape[1])

    @property
    def nbytes(self) -> int:
        return sum(q.nbytes for q in self.parts)
