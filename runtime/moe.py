"""The mixture of experts of a layer. Array axes: B batch, T tokens, D hidden, F expert hidden, E experts, A active."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from minibble.quantize.config import ModelConfig
from minibble.runtime.kernels.moe4 import moe4
from minibble.runtime.kernels.router import route
from minibble.runtime.layers import Linear

if TYPE_CHECKING:
    from minibble.runtime.kernels.moe4.table import RecordTable
    from minibble.runtime.pipeline import Pause


class Expert(nn.Module):
    """down(silu(gate x) * up x); gate (w1) and up (w3) are one matrix."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_up = Linear(2 * config.intermediate_size, config.hidden_size)
        self.down = Linear(config.hidden_size, config.intermediate_size)


class MoE(nn.Module):
    """Each token goes to its A most probable experts, weighted by their probabilities made to sum to 1.

    The experts are modules in `table`, or, on GPUs in 4 bits, records in `packed`, and then there are no modules.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.active = config.experts_per_token
        self.router = Linear(config.num_experts, config.hidden_size)
        self.table = tuple(Expert(config) for _ in range(config.num_experts))  # much quicker to index than its twin
        self.experts = nn.ModuleList(self.table)
        self.packed: RecordTable | None = None

    def set_packed(self, packed: "RecordTable") -> None:
        """Hold all experts as records in the kernels' layout."""
        self.packed, self.table, self.experts = packed, (), nn.ModuleList()

    def route(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """The chosen experts [N, A] and their weights, float32 [N, A]."""
        router = self.router.held
        assert isinstance(router, Tensor)
        return route(x_ND, router, self.active)

    def forward(self, x_BTD: Tensor) -> Tensor:
        parts = self.summands(x_BTD)
        return (parts[0] if len(parts) == 1 else parts.sum(0, dtype=torch.float32)).to(x_BTD.dtype)

    def summands(self, x_BTD: Tensor) -> Tensor:
        """`forward` as parts [S, B, T, D] that are still to be added up, of any float dtype."""
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
        ids, weights = self.route(x_ND)
        if self.packed is not None:
            return self.packed(x_ND, ids, weights).unflatten(1, x_BTD.shape[:-1])
        return moe4(x_ND, ids, weights, self.table).view_as(x_BTD)[None]

    def fetch(self, x_MD: Tensor, ids_MA: Tensor, weights_MA: Tensor) -> "Pause | None":
        """The pause in which the chosen experts come that are elsewhere or the host's; None if none is needed."""
        return None if self.packed is None else self.packed.fetch(x_MD, ids_MA, weights_MA)

    def parts(self, x_MD: Tensor, ids_MA: Tensor, weights_MA: Tensor, fetch: "Pause | None" = None) -> Tensor:
        """What the experts chosen by `route` add to a few tokens, float32, as parts [S, M, D] whose sum it is.

        `fetch` is the pause made for them.
        """
        if self.packed is not None:
            return self.packed.decode(x_MD, ids_MA, weights_MA, fetch)
        return moe4(x_MD, ids_MA, weights_MA, self.table).float()[None]
