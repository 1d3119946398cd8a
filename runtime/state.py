"""What a sequence leaves behind: keys and values of the softmax layers, float32 state of the lightning layers.

Array axes: B batch, T tokens, H heads, G key-value heads, K head dim.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from minibble.quantize.config import ModelConfig

_GROWTH = 256  # tokens; the least by which a key-value cache grows


def empty_lightning_state(config: ModelConfig, batch: int, device: torch.device) -> Tensor:
    """The state of a lightning layer before the first token: zeros, float32 [B, H, K, K]."""
    H, K = config.num_attention_heads, config.head_dim
    return torch.zeros(batch, H, K, K, dtype=torch.float32, device=device)


class HybridState(Cache):
    """The cache of one forward after the other, for `past_key_values`.

    `reserve` is the number of tokens to make room for at once; beyond it the cache doubles. `length` counts the
    tokens seen, padding included; `valid` [B, length] is False at padding, or None where there is none. Forwards
    without gradients run in torch's inference mode: so must whatever writes into the tensors held here.
    """

    is_croppable = False

    def __init__(self, config: ModelConfig, reserve: int = 0):
        super().__init__(layers=[])
        self.config = config
        self.reserve = reserve
        self.length = 0
        self.valid: Tensor | None = None
        self.lightning: dict[int, Tensor] = {}
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    def lightning_state(self, layer: int, batch: int, device: torch.device) -> Tensor:
        """The state of a lightning layer, float32 [B, H, K, K]; zeros before the first token."""
        if layer not in self.lightning:
            return empty_lightning_state(self.config, batch, device)
        return self.lightning[layer]

    def append(self, layer: int, k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        """Store the keys and values of new tokens; returns those of all tokens so far, [B, G, length + T, K]."""
        tokens = self.length + k_BGTK.shape[2]
        for store, new in ((self.keys, k_BGTK), (self.values, v_BGTK)):
            held = store.get(layer)
            if held is None or held.shape[2] < tokens:
                store[layer] = held = self._grown(held, new, tokens)
            held[:, :, self.length : tokens] = new
        return self.keys[layer][:, :, :tokens], self.values[layer][:, :, :tokens]

    def _grown(self, held: Tensor | None, new: Tensor, tokens: int) -> Tensor:
        room = max(tokens, self.reserve)
        if held is not None:
            room = max(room, 2 * held.shape[2], tokens + _GROWTH)
        grown = new.new_empty(*new.shape[:2], room, new.shape[3])
        if held is not None:
            grown[:, :, : self.length] = held[:, :, : self.length]
        return grown

    def advance(self, tokens: int, valid: Tensor | None) -> None:
        """Count `tokens` more, seen by every layer; `valid` [B, length + tokens] marks the real ones, if any is not."""
        self.length += tokens
        self.valid = valid

    def snapshot(self) -> "HybridState":
        """A copy that later tokens do not touch."""
        copy = HybridState(self.config, self.reserve)
        copy.restore(self)
        return copy

    def restore(self, saved: "HybridState") -> None:
        """Take over the contents of `saved`, which stays as it is."""
        self.length = saved.length
        self.valid = None if saved.valid is None else saved.valid.clone()
        self._set(*({layer: x.clone() for layer, x in tensors.items()} for tensors in saved._tensors()))

    def _tensors(self) -> tuple[dict[int, Tensor], dict[int, Tensor], dict[int, Tensor]]:
        return self.lightning, self.keys, self.values

    def _set(self, lightning: dict[int, Tensor], keys: dict[int, Tensor], values: dict[int, Tensor]) -> None:
        self.lightning, self.keys, self.values = lightning, keys, values

    def _map_batch(self, change: Any) -> None:
        """Apply `change`, a function of tensors along the batch, to everything held."""
        self._set(*({layer: change(x) for layer, x in tensors.items()} for tensors in self._tensors()))
        if self.valid is not None:
            self.valid = change(self.valid)

    @property
    def nbytes(self) -> int:
        """Bytes held, room for later tokens included."""
        return sum(x.nbytes for tensors in self._tensors() for x in tensors.values())

    # What transformers' generation asks of a cache.

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen so far, the same for every layer."""
        return self.length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: there is no bound."""
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Keys that `query_length` new tokens see, and the position of the first one."""
        return self.length + query_length, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make row i the sequence that was row `beam_idx[i]`."""
        self._map_batch(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence `repeats` times, side by side."""
        self._map_batch(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences `indices`."""
        self._map_batch(lambda x: x[indices.to(x.device)])

    def reset(self) -> None:
        """Forget every token."""
        self._set({}, {}, {})
        self.length, self.valid = 0, None

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: the lightning state cannot be rolled back. Take a snapshot and restore it instead."""
        raise NotImplementedError(
            "a lightning state cannot forget single tokens, so assisted generation and prompt lookup are not "
            "possible; HybridState.snapshot() and restore() bring back an earlier point"
        )

    @property
    def batch_size(self) -> int:
        """Number of sequences, -1 before the first token."""
        return next((x.shape[0] for tensors in self._tensors() for x in tensors.values()), -1)

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return self.length > 0

    @property
    def is_sliding(self) -> list[bool]:
        return [False] * self.config.num_hidden_layers

    def __len__(self) -> int:
        return self.config.num_hidden_layers
