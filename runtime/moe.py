"""The mixture of experts of a layer. Array axes: B batch, T tokens, D hidden, F expert hidden, E experts, A active."""

from torch import Tensor, nn

from minibble.quantize.config import ModelConfig
from minibble.runtime.kernels.moe4 import moe4
from minibble.runtime.layers import Linear


class Expert(nn.Module):
    """down(silu(gate x) * up x); gate (w1) and up (w3) are one matrix."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_up = Linear(2 * config.intermediate_size, config.hidden_size)
        self.down = Linear(config.hidden_size, config.intermediate_size)


class MoE(nn.Module):
    """Each token goes to its A most probable experts, weighted by their probabilities made to sum to 1."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.active = config.experts_per_token
        self.router = Linear(config.num_experts, config.hidden_size)
        self.table = tuple(Expert(config) for _ in range(config.num_experts))  # much quicker to index than its twin
        self.experts = nn.ModuleList(self.table)

    def route(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """The chosen experts [N, A] and their weights, float32 [N, A]."""
        # A softmax over all experts, its A largest made to sum to 1, is the softmax over those A.
        logits, ids = self.router(x_ND.float()).topk(self.active, dim=-1)
        return ids, logits.softmax(dim=-1)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
        ids, weights = self.route(x_ND)
        return moe4(x_ND, ids, weights, self.table).view_as(x_BTD)
