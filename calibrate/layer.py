"""One layer on all calibration tokens: each matrix is solved from what it receives, then used as its file decodes.

So whatever comes after a matrix, in this layer and in the next ones, sees the errors before it. The mathematics is the
runtime's own; here it is cut where matrices receive their inputs.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from minibble.calibrate.hessian import Hessians
from minibble.calibrate.matrices import LayerMatrices, Settled, Tensors
from minibble.calibrate.plan import CHUNK_TOKENS
from minibble.calibrate.setup import Setup
from minibble.calibrate.stores import Stores, spans, take
from minibble.quantize.errors import CalibrationError
from minibble.runtime.attention import Context, rotations
from minibble.runtime.kernels.moe4 import activations
from minibble.runtime.layers import residual

MIN_TOKENS = 4  # an expert that fewer tokens reach is rounded to nearest
# The layer's tokens as a whole count in an expert's Hessian as this many tokens for each of its inputs. On the small
# reference model 1 gave 3 % less KL divergence than 0 where experts had 1 or 4 tokens an input; with 60, no difference.
PRIOR = 1
PRIOR_SAMPLE = 8192  # of them so many, evenly spread, are looked at


class LayerPass:
    """Takes the stores from the inputs of layer `index` to its outputs: `attend`, `run_experts` for all, `close`.

    The tensors given are the source's, or QuantizedTensors of a layer that is finished already and only runs.
    """

    def __init__(self, setup: Setup, index: int, stores: Stores):
        self.setup, self.index, self.stores = setup, index, stores
        self.matrices = LayerMatrices(setup, index)
        self.layer = self.matrices.layer
        self._tokens_of: list[Tensor] = []
        self._weights_of: list[Tensor] = []

    @property
    def expert_tokens(self) -> list[int]:
        """How many tokens each expert got; known after `attend`."""
        return [len(tokens) for tokens in self._tokens_of]

    def attend(self, tensors: Tensors) -> dict[str, Settled]:
        """From the layer's inputs to those of its experts, which then stand in `stores.hidden`."""
        for module in ("input_norm", "post_norm", "moe.router", "attention.norm"):
            if module in self.matrices.names:
                self.matrices.hold_plain(module, tensors)
        return self._project_in(tensors) | self._project_out(tensors)

    def run_experts(self, experts: range, tensors: Tensors) -> dict[str, Settled]:
        """Settle some experts and add what they give to `stores.sums`."""
        settled = self._settle_experts("gate_up", experts, tensors)
        settled |= self._settle_experts("down", experts, tensors)
        for expert in experts:
            tokens, weights = self._tokens_of[expert], self._weights_of[expert]
            for rows in spans(len(tokens), CHUNK_TOKENS):
                one = self.layer.moe.table[expert]
                y_ND = one.down(activations(self._received(tokens[rows]), one)).float() * weights[rows, None]
                sums = self.stores.sums
                sums.index_add_(0, tokens[rows].to(sums.device), y_ND.to(sums.device))
            for kind in ("gate_up", "down"):
                self.matrices.release(f"moe.experts.{expert}.{kind}")
        return settled

    def close(self) -> None:
        """The layer's outputs take their place in `stores.hidden`."""
        hidden = self.stores.hidden
        for rows in self._chunks():
            y, sums = (take(store, rows, self.setup.device) for store in (hidden, self.stores.sums))
            h = residual(y, self.layer.mlp_alpha, sums.to(y.dtype), self.layer.mlp_beta)
            if not torch.isfinite(h.sum()):
                raise CalibrationError(f"layer {self.index}: the outputs have NaN or infinite values")
            hidden[rows] = h.to(hidden.device)

    def _project_in(self, tensors: Tensors) -> dict[str, Settled]:
        module = "attention.in_proj"
        settled = self.matrices.read_back(module, tensors)
        if settled is None:
            H = Hessians(1, self.setup.config.hidden_size, self.setup.device)
            for rows in self._chunks():
                H.add(0, self._normed(rows))
            settled = self.matrices.solve([module], H, tensors, [{}])
        return settled

    def _project_out(self, tensors: Tensors) -> dict[str, Settled]:
        module, attention, mixed = "attention.out_proj", self.layer.attention, self.stores.mixed
        context, settled = self._context(), self.matrices.read_back(module, tensors)
        H = Hessians(int(settled is None), mixed.shape[1], self.setup.device)
        for rows in self._chunks():
            x_BTD = self._normed(rows).unflatten(0, (-1, self.setup.seq_len))
            o_ND = attention.mix(attention.in_proj(x_BTD), context).flatten(0, 1)
            mixed[rows] = o_ND.to(mixed.device)
            if settled is None:
                H.add(0, o_ND)
        if settled is None:
            settled = self.matrices.solve([module], H, tensors, [{}])
            del H
        routed = [self._to_experts(rows) for rows in self._chunks()]
        ids, weights = (torch.cat(both) for both in zip(*routed, strict=True))
        self._assign(ids, weights)
        return settled

    def _to_experts(self, rows: slice) -> tuple[Tensor, Tensor]:
        """The rest of attention for some tokens; returns the experts chosen and their weights, [tokens, A] each."""
        x_ND, mixed = self._normed(rows), take(self.stores.mixed, rows, self.setup.device)
        h_ND = residual(x_ND, self.layer.alpha, self.layer.attention.out_proj(mixed), self.layer.beta)
        y_ND = self.layer.post_norm(h_ND).to(h_ND.dtype)
        self.stores.hidden[rows] = y_ND.to(self.stores.hidden.device)
        return self.layer.moe.route(y_ND)

    def _assign(self, ids_NA: Tensor, weights_NA: Tensor) -> None:
        """Each expert's tokens, in their order, and their weights."""
        self.stores.sums.zero_()
        order = ids_NA.reshape(-1).argsort(stable=True)
        counts = torch.bincount(ids_NA.reshape(-1), minlength=self.setup.config.num_experts).tolist()
        self._tokens_of = list((order // ids_NA.shape[1]).split(counts))
        self._weights_of = list(weights_NA.reshape(-1)[order].split(counts))
        if self.setup.strict and min(counts) < MIN_TOKENS:
            few = [expert for expert, count in enumerate(counts) if count < MIN_TOKENS]
            raise CalibrationError(
                f"layer {self.index}: {len(few)} experts get fewer than {MIN_TOKENS} tokens (expert {few[0]}: "
                f"{counts[few[0]]}) and --strict forbids to round them to nearest: take more --samples"
            )

    def _settle_experts(self, kind: str, experts: range, tensors: Tensors) -> dict[str, Settled]:
        settled: dict[str, Settled] = {}
        to_solve = []
        for expert in experts:
            count, module = len(self._tokens_of[expert]), f"moe.experts.{expert}.{kind}"
            done = self.matrices.read_back(module, tensors)
            if done is not None:
                settled |= done
            elif count < MIN_TOKENS:
                text = f"{count} tokens, fewer than {MIN_TOKENS}: nearest rounding"
                settled |= self.matrices.round(module, tensors, {"tokens": count, "fallback": text})
            else:
                to_solve.append(expert)
        modules = [f"moe.experts.{expert}.{kind}" for expert in to_solve]
        H = self._expert_hessians(kind, to_solve)
        prior = PRIOR * H.sum_BKK.shape[1]
        notes = [{"shrinkage": float(f"{prior / (prior + tokens):.4g}")} for tokens in H.tokens]
        return settled | self.matrices.solve(modules, H, tensors, notes)

    def _expert_hessians(self, kind: str, experts: list[int]) -> Hessians:
        """Of the tokens routed to each expert, and of the layer's tokens as a whole as its prior."""
        config, hidden = self.setup.config, self.stores.hidden
        K = config.hidden_size if kind == "gate_up" else config.intermediate_size
        H = Hessians(len(experts), K, self.setup.device)
        sample = torch.arange(0, len(hidden), -(-len(hidden) // PRIOR_SAMPLE))
        for b, expert in enumerate(experts):
            tokens, weights = self._tokens_of[expert], None
            if self.setup.router_weights:
                weights = self._weights_of[expert]
            for rows in spans(len(tokens), CHUNK_TOKENS):
                x_ND = self._expert_inputs(kind, expert, tokens[rows])
                H.add(b, x_ND, None if weights is None else weights[rows])
            each = 1.0 if weights is None else weights.square().mean().item()
            H.add_prior(b, self._expert_inputs(kind, expert, sample), PRIOR * K * each)
        return H

    def _expert_inputs(self, kind: str, expert: int, tokens: Tensor) -> Tensor:
        x_ND = self._received(tokens)
        return x_ND if kind == "gate_up" else activations(x_ND, self.layer.moe.table[expert])

    def _received(self, tokens: Tensor) -> Tensor:
        """What experts receive for some tokens, [n, D]."""
        return take(self.stores.hidden, tokens, self.setup.device)

    def _normed(self, rows: slice) -> Tensor:
        x_ND = take(self.stores.hidden, rows, self.setup.device)
        return self.layer.input_norm(x_ND).to(x_ND.dtype)

    def _chunks(self) -> Iterator[slice]:
        """The tokens, some whole sequences at a time."""
        return spans(len(self.stores.hidden), self.setup.plan.chunk_sequences * self.setup.seq_len)

    def _context(self) -> Context:
        cos, sin = rotations(self.setup.config, torch.arange(self.setup.seq_len, device=self.setup.device)[None])
        return Context(cos, sin, None, None, None)
