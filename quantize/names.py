"""Other tools' tensor names, translated to the released checkpoint's."""

import re
from typing import NamedTuple

_DERIVED = re.compile(
    r"model\.layers\.\d+\.self_attn\."
    r"(slope_rate|query_decay|key_decay|diagonal_decay|rotary_emb\.inv_freq)(\.weight)?"
)
_LAYER = re.compile(r"(model\.layers\.\d+\.)(?:mlp|block_sparse_moe)\.(.+)")
_EXPERT = re.compile(r"experts\.(\d+)\.(w1|w2|w3|gate_proj|up_proj|down_proj)(\..+)")
_FUSED = re.compile(r"(model\.layers\.\d+\.)(?:mlp|block_sparse_moe)\.experts\.(gate_up_proj|down_proj)(\.weight)?")
_MATRIX = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


class FusedPart(NamedTuple):
    """Where one expert matrix lies in a fused 3-D tensor [E, rows, in]: `[expert, start:stop]`."""

    name: str
    expert: int
    start: int
    stop: int


def canonical_name(name: str) -> str | None:
    """The released checkpoint's name for `name`; None for buffers that are derived, never read.

    Names that belong to no alias come back unchanged, so that the inventory can say they are unknown.
    """
    if _DERIVED.fullmatch(name):
        return None
    layer = _LAYER.fullmatch(name)
    if layer is None:
        return name
    prefix, rest = layer.groups()
    expert = _EXPERT.fullmatch(rest)
    if expert is not None:
        index, matrix, suffix = expert.groups()
        return f"{prefix}block_sparse_moe.experts.{index}.{_MATRIX.get(matrix, matrix)}{suffix}"
    return f"{prefix}block_sparse_moe.{rest}"


def fused_parts(name: str, num_experts: int, intermediate_size: int, hidden_size: int) -> list[FusedPart] | None:
    """The expert matrices inside the fused tensor `name`, or None if `name` is not a fused one.

    `gate_up_proj` is [E, 2F, D] with the rows of w1 first, then w3; `down_proj` is [E, D, F].
    """
    match = _FUSED.fullmatch(name)
    if match is None:
        return None
    prefix, kind, _ = match.groups()
    F, D = intermediate_size, hidden_size
    matrices = [("w1", 0, F), ("w3", F, 2 * F)] if kind == "gate_up_proj" else [("w2", 0, D)]
    return [
        FusedPart(f"{prefix}block_sparse_moe.experts.{expert}.{matrix}.weight", expert, start, stop)
        for expert in range(num_experts)
        for matrix, start, stop in matrices
    ]
