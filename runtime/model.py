"""MiniMax-Text-01 and M1: structure and mathematics, presented as a transformers model.

Array axes: B batch, T new tokens, L tokens with the past, D hidden, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from minibble.quantize.config import ModelConfig
from minibble.runtime import memory
from minibble.runtime.attention import Context, LightningAttention, SoftmaxAttention, rotations
from minibble.runtime.devices import cap
from minibble.runtime.experts.turns import Turns
from minibble.runtime.graphs import Decoder
from minibble.runtime.kernels import reference_forced
from minibble.runtime.kernels.norm import norm_residual, rms_norm
from minibble.runtime.layers import Embedding, Linear, RMSNorm, residual
from minibble.runtime.layout import layout
from minibble.runtime.masks import attention_mask_2d, left_padding, visible
from minibble.runtime.moe import MoE
from minibble.runtime.pipeline import hop
from minibble.runtime.plan import PREFILL_CHUNK, MemoryPlan
from minibble.runtime.planning.placement import Placement
from minibble.runtime.presented import RuntimeConfig, presented
from minibble.runtime.state import HybridState

if TYPE_CHECKING:
    from minibble.runtime.experts.store import ExpertStore


class Layer(nn.Module):
    """h = a x + b attention(x), x = norm(h); y = a' z + b' moe(z), z = norm(h). The residual is the normed input."""

    def __init__(self, config: ModelConfig, index: int):
        super().__init__()
        lightning = config.attention[index] == "lightning"
        self.input_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = LightningAttention(config, index) if lightning else SoftmaxAttention(config, index)
        self.post_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.moe = MoE(config)
        self.alpha = config.lightning_alpha if lightning else config.softmax_alpha
        self.beta = config.lightning_beta if lightning else config.softmax_beta
        self.mlp_alpha, self.mlp_beta = config.mlp_alpha, config.mlp_beta

    @property
    def device(self) -> torch.device:
        """Where all its weights are."""
        return self.post_norm.weight.device

    def forward(self, h_BTD: Tensor, context: Context) -> Tensor:
        x = self.input_norm(h_BTD).to(h_BTD.dtype)
        h = residual(x, self.alpha, self.attention(x, context), self.beta)
        y = self.post_norm(h).to(h.dtype)
        return residual(y, self.mlp_alpha, self.moe(y), self.mlp_beta)


class MiniMaxForCausalLM(PreTrainedModel, GenerationMixin):
    """The language model. Made by `minibble.load`; weights may be 4-bit, the mathematics here does not know.

    `prefill_chunk` bounds the tokens that one pass through the layers takes; longer inputs go in pieces.
    `checkpoint` and its `tokenizer` are there if it was loaded from one; `unused_ids` are never generated.
    """

    config_class = RuntimeConfig
    main_input_name = "input_ids"
    _supports_sdpa = True

    def __init__(self, config: ModelConfig, dtype: torch.dtype = torch.float32):
        super().__init__(presented(config, dtype))
        self.minibble = config
        self.prefill_chunk = PREFILL_CHUNK
        self.decoder = Decoder()
        self.budget_bytes: int | None = None  # of a device, for a model without a placement
        self.placement: Placement | None = None  # where its layers and experts are, on GPUs
        self.stores: list[ExpertStore] = []  # of experts that are not all on their device
        self.turns = Turns()
        self.tokenizer: Any = None
        self.embedding = Embedding(config.vocab_size, config.hidden_size, dtype)
        self.layers: Any = nn.ModuleList(Layer(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = Linear(config.vocab_size, config.hidden_size)
        self.unused_ids: Tensor | None = None
        self.checkpoint: Any = None

    @classmethod
    def random(cls, config: ModelConfig, dtype: torch.dtype = torch.float32, seed: int = 0) -> "MiniMaxForCausalLM":
        """A trainable model with normal weights of deviation 0.02 and unit norms."""
        model = cls(config, dtype)
        generator = torch.Generator().manual_seed(seed)
        exact = {model.head, *(module.router for module in model.modules() if isinstance(module, MoE))}
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if isinstance(module, RMSNorm):
                    value = torch.ones(parameter.shape)
                else:
                    value = torch.empty(parameter.shape).normal_(0, 0.02, generator=generator)
                    value = value if module in exact else value.to(dtype)
                setattr(module, name, nn.Parameter(value))
        return model

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the activations."""
        return self.embedding.dtype

    @property
    def device(self) -> torch.device:
        """Where token ids go: the first layer's device; others may be elsewhere (runtime/pipeline.py)."""
        return self.embedding.device

    @property
    def devices(self) -> list[torch.device]:
        """The devices of its layers, in their order, each once."""
        return list(dict.fromkeys([self.device, *(layer.device for layer in self.layers)]))

    def memory_plan(self, context: int, batch: int = 1) -> MemoryPlan | Placement:
        """What `batch` sequences of `context` tokens take, predicted; only for a model loaded from a checkpoint."""
        return memory.plan(self, context, batch)

    def memory_report(self, context: int = 4096, batch: int = 1) -> dict[str, Any]:
        """`predicted`, the plan, beside `measured`: bytes of the weights, of each GPU, and what experts did."""
        return memory.report(self, context, batch)

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The inventory's tensors as views of the model's, for a model without 4-bit weights."""
        for name, place in layout(self.minibble).items():
            weight = self.get_submodule(place.module).weight
            assert isinstance(weight, Tensor), f"{name} is not held as a tensor"
            yield name, weight[place.start : place.stop]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: HybridState | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **ignored: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, float32 [B, T, V], of the tokens `input_ids` [B, T], or of the last `logits_to_keep` alone.

        `attention_mask` [B, L] or [B, T] is 0 at padding, which may stand on either side. `past_key_values` is the
        state that earlier tokens left and is updated; without one, `use_cache=True` starts it.
        """
        state = past_key_values
        if state is not None and not isinstance(state, HybridState):
            raise TypeError(f"past_key_values is a {type(state).__name__}, expected a HybridState")
        if state is None and use_cache:
            state = HybridState(self.minibble, reserve=input_ids.shape[1])
        logits = None
        with self.turns.take(self.devices) if self.stores else nullcontext():
            if state is not None and state.length and input_ids.shape[1] == 1:
                logits = self.decoder.step(self, input_ids, attention_mask, position_ids, state)
            if logits is None:
                h = self.hidden(input_ids, attention_mask, position_ids, state, logits_to_keep)
                logits = self.head(h, out_dtype=torch.float32).to(input_ids.device)
        return CausalLMOutputWithPast(logits=logits, past_key_values=state if use_cache is not False else None)

    def hidden(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        state: HybridState | None = None,
        keep: int = 0,
    ) -> Tensor:
        """What goes into the head, [B, T, D] on its device, or of the last `keep` tokens alone; as in `forward`."""
        if state is None and input_ids.shape[1] > self.prefill_chunk:
            state = HybridState(self.minibble, reserve=input_ids.shape[1])  # between the pieces
        past = 0 if state is None else state.length
        mask = attention_mask_2d(attention_mask, past, input_ids, None if state is None else state.valid)
        positions = _positions(position_ids, mask, past, input_ids)
        pieces, known = [], self.embedding.known(input_ids)
        for start in range(0, input_ids.shape[1], self.prefill_chunk):
            part = slice(start, start + self.prefill_chunk)
            ids = known[:, part]
            seen = None if mask is None else mask[:, : past + start + ids.shape[1]]
            taking = nullcontext() if state is None else state.taking()
            with torch.inference_mode(not torch.is_grad_enabled()), taking:  # a tenth less time a token on CPUs
                h = self._layers(ids, positions[:, part], seen, state)
            pieces.append(h[:, -keep:] if keep else h)
        return (torch.cat(pieces, dim=1) if len(pieces) > 1 else pieces[0])[:, -keep:]

    def _layers(self, ids: Tensor, positions: Tensor, mask: Tensor | None, state: HybridState | None) -> Tensor:
        """The normed hidden states [B, T, D] of one piece of the input, on the device of the last layer."""
        past, T = (0 if state is None else state.length), ids.shape[1]
        cos, sin = rotations(self.minibble, positions)
        valid = None if mask is None else mask[:, past:]
        h = self.embedding(ids)
        device = h.device
        if h.is_cuda and not torch.is_grad_enabled() and not reference_forced():
            starts = None if mask is None else left_padding(mask)
            seen = None if starts is not None else visible(mask, past, T, device)
            h = self._layers_at_once(h, Context(cos, sin, valid, seen, state, starts))
        else:
            context = Context(cos, sin, valid, visible(mask, past, T, device), state)
            for layer, there in self._on_devices(context):
                h = layer(hop(h, layer.device), there)
            h = self.norm(h).to(h.dtype)
        if state is not None:
            state.advance(T, mask)
        return h

    def _layers_at_once(self, h_BTD: Tensor, context: Context) -> Tensor:
        """The same with one launch for each residual and the norm after it."""
        first, *norms = self.norms()
        x = rms_norm(h_BTD, first.weight_on(h_BTD.device), first.eps, h_BTD.dtype)
        for (layer, there), following in zip(self._on_devices(context), norms, strict=True):
            x = hop(x, layer.device)
            a, b = layer.attention, layer.post_norm
            y = norm_residual(x, a(x, there)[None], layer.alpha, layer.beta, b.weight, b.eps)
            weight = following.weight_on(y.device)
            # Unnamed, so that its memory is free again when the next layer needs most.
            x = norm_residual(y, layer.moe.summands(y), layer.mlp_alpha, layer.mlp_beta, weight, following.eps)
        return x

    def _on_devices(self, context: Context) -> Iterator[tuple[Any, Context]]:
        """Each layer with the context on its device."""
        for layer in self.layers:
            context = context.on(layer.device)
            yield layer, context

    def norms(self) -> list[RMSNorm]:
        """The norm before each layer, and the last one."""
        return [*(layer.input_norm for layer in self.layers), self.norm]

    def close(self) -> None:
        """Give back host memory and files of experts that are elsewhere; the model cannot be used any more."""
        for store in self.stores:
            store.close()
        if self.placement is not None:
            for plan in self.placement.devices:
                cap(torch.device(plan.device), None)

    @contextmanager
    def using_experts(self) -> Iterator[None]:
        """While work is issued that experts come for: then they are given up, and after an error what waits for more of
        them ends."""
        try:
            yield
        except BaseException:
            for store in self.stores:
                store.give_up()
            raise
        finally:
            for store in self.stores:
                store.used_all()

    def decode_path(self) -> dict[str, int]:
        """How the single tokens after a prompt went through the layers so far: how many each way, or for which reason.

        "graph" and "eager" are the fused step, replayed or launched; anything else says why the ordinary path took it.
        """
        return dict(self.decoder.taken)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self.decoder.reset()  # graphs read the weights where they were
        return super()._apply(*args, **kwargs)

    # From its second step on generate() only adds ones to the mask. The state knows the rest; without the mask nobody
    # has to look at it, which would wait for the device.

    def _update_model_kwargs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        updated: dict[str, Any] = super()._update_model_kwargs_for_generation(*args, **kwargs)  # type: ignore[misc]
        return updated | {"mask_is_in_state": updated.get("past_key_values") is not None}

    @wraps(GenerationMixin.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        known = kwargs.pop("mask_is_in_state", False)
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(*args, **kwargs)  # type: ignore[misc]
        if known:
            inputs.pop("attention_mask", None)
        return inputs

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> bool:
        given = model_kwargs.get("past_key_values")
        if given is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = HybridState(self.minibble, reserve=max_cache_length)
        elif isinstance(given, HybridState):
            given.reserve = max(given.reserve, max_cache_length)
        return False

    @torch.no_grad()
    def generate(self, *args: Any, logits_processor: Any = None, **kwargs: Any) -> Any:  # type: ignore[override, misc]
        """transformers' `generate`, never choosing an id whose row of the head is all zero."""
        processors = LogitsProcessorList(logits_processor or [])
        if self.unused_ids is not None and len(self.unused_ids):
            processors.insert(0, _Never(self.unused_ids))
        return GenerationMixin.generate(self, *args, logits_processor=processors, **kwargs)  # type: ignore[misc, arg-type]


class _Never(LogitsProcessor):
    """Makes the probability of `ids` zero."""

    def __init__(self, ids: Tensor):
        self.ids = ids

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.index_fill(-1, self.ids.to(scores.device), float("-inf"))


def _positions(position_ids: Tensor | None, mask: Tensor | None, past: int, input_ids: Tensor) -> Tensor:
    """Positions [B or 1, T] of the new tokens: those given, or the count of real tokens before each."""
    T = input_ids.shape[1]
    if position_ids is not None:
        return position_ids.reshape(-1, position_ids.shape[-1])[:, -T:]
    if mask is None:
        return torch.arange(past, past + T, device=input_ids.device)[None]
    return (mask.cumsum(1) - 1).clamp(min=0)[:, past:]
