"""How a sequence's tokens are shared among the GPU's processors."""

from typing import NamedTuple

BLOCK = 64  # tokens that a program takes at once
LEAST_SEGMENT, LEAST_PIECE = 512, 256  # tokens that are worth a program of their own


class Cuts(NamedTuple):
    """How a sequence's tokens are shared among programs: segments, all but the last of `each` pieces."""

    segments: int
    each: int
    piece: int  # tokens, a multiple of BLOCK

    @property
    def pieces(self) -> int:
        return (self.segments - 1) * self.each


def cut(tokens: int, rows: int, processors: int) -> Cuts:
    """As many segments as give each of `processors` a program, and pieces likewise; `rows`: heads times sequences."""
    segments = max(1, min(processors // rows, tokens // LEAST_SEGMENT))
    each = max(1, processors // (rows * (segments - 1))) if segments > 1 else 1
    each = min(each, max(1, tokens // (segments * LEAST_PIECE)))
    piece = -(-tokens // (segments * each * BLOCK)) * BLOCK
    return Cuts(-(-tokens // (piece * each)), each, piece)
