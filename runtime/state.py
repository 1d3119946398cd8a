"""What a sequence leaves behind: keys and values of the softmax layers, float32 state of the lightning layers.

Array axes: B batch, T tokens, H heads, G key-value heads, K head dim.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from minibble.quantize.config import ModelConfig
from minibble.quantize.errors import StateError

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

    Once there, tensors keep their places in memory as long as the batch keeps its size and the cache its room: new
    contents are copied into them. `bound` is what somebody built on these places (a captured decode step); it is
    dropped as soon as one of them changes, and with the state. A `broken` state was left in the middle of a token: some
    layers have seen it and some have not.
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
        self.bound: Any = None
        self.broken = False

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"bound": None}  # a copy has other places

    def lightning_state(self, layer: int, batch: int, device: torch.device) -> Tensor:
        """The state of a lightning layer, float32 [B, H, K, K]; zeros before the first token."""
        if layer not in self.lightning:
            return empty_lightning_state(self.config, batch, device)
        return self.lightning[layer]

    def set_lightning_state(self, layer: int, state_BHKK: Tensor) -> None:
        """Make `state_BHKK`, which may be the tensor already held, the state of a lightning layer."""
        self._put(self.lightning, layer, state_BHKK)

    def append(self, layer: int, k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        """Store the keys and values of new tokens; returns those of all tokens so far, [B, G, length + T, K]."""
        tokens = self.length + k_BGTK.shape[2]
        k, v = self.places(layer, k_BGTK.shape[2], k_BGTK)
        k[:, :, self.length : tokens], v[:, :, self.length : tokens] = k_BGTK, v_BGTK
        return k[:, :, :tokens], v[:, :, :tokens]

    def places(self, layer: int, tokens: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """The caches of keys and values, [B, G, L, K] as `like` is but for L, with places for `tokens` more."""
        needed = self.length + tokens
        for store in (self.keys, self.values):
            if layer not in store or store[layer].shape[2] < needed:
                self._grow(store, layer, like, needed)
        return self.keys[layer], self.values[layer]

    def make_room(self, tokens: int) -> None:
        """Have places for `tokens` more in every cache that has been started."""
        for store in (self.keys, self.values):
            for layer, held in store.items():
                if held.shape[2] < self.length + tokens:
                    self._grow(store, layer, held, self.length + tokens)

    def suits(self, batch: int, dtype: torch.dtype, devices: list[torch.device]) -> bool:
        """True if it has started with `batch` sequences, each layer on its device, keys and values in `dtype`."""
        held = [(layer, x) for store in self._tensors() for layer, x in store.items()]
        fits = all(x.shape[0] == batch and x.device == devices[layer] for layer, x in held)
        right = all(x.dtype == dtype for store in (self.keys, self.values) for x in store.values())
        return self.length > 0 and fits and right and all(x.dtype == torch.float32 for x in self.lightning.values())

    @property
    def capacity(self) -> int:
        """Tokens that the key-value caches have places for; 0 if there are none."""
        return min((held.shape[2] for store in (self.keys, self.values) for held in store.values()), default=0)

    def _grow(self, store: dict[int, Tensor], layer: int, like: Tensor, tokens: int) -> Tensor:
        """Places for at least `tokens` in a cache [B, G, L, K] like `like`, those in use kept."""
        held, room = store.get(layer), self.reserve
        if room < tokens:
            room = tokens if held is None else max(2 * held.shape[2], tokens + _GROWTH)
        grown = like.new_empty(*like.shape[:2], room, like.shape[3])
        if held is not None:
            grown[:, :, : self.length] = held[:, :, : self.length]
        store[layer], self.bound = grown, None
        return grown

    @contextmanager
    def taking(self) -> Iterator[None]:
        """While layers see tokens, until they are counted; an error in the middle leaves the state broken.

        StateError if it is broken already.
        """
        if self.broken:
            raise StateError(
                "an error left this state in the middle of a token: start a new one, or restore an earlier snapshot"
            )
        self.broken = True
        yield
        self.broken = False

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
        for ours, theirs in zip(self._tensors(), saved._tensors(), strict=True):
            for layer in ours.keys() - theirs.keys():
                del ours[layer]
                self.bound = None
        self.length, self.broken = saved.length, saved.broken
        self.valid = None if saved.valid is None else saved.valid.clone()
        for layer, state in saved.lightning.items():
            self._put(self.lightning, layer, state, copy=True)
        for ours, theirs in ((self.keys, saved.keys), (self.values, saved.values)):
            for layer, held in theirs.items():
                self._put(ours, layer, held[:, :, : saved.length], copy=True)

    def _tensors(self) -> tuple[dict[int, Tensor], dict[int, Tensor], dict[int, Tensor]]:
        return self.lightning, self.keys, self.values

    def _put(self, store: dict[int, Tensor], layer: int, new: Tensor, copy: bool = False) -> None:
        """Hold `new`, in the old places if it fits there; of a cache [B, G, L, K] it may be the beginning.

        With `copy`, `new` itself is never held.
        """
        held = store.get(layer)
        if held is not None and new.data_ptr() == held.data_ptr() and new.shape == held.shape:
            return
        # Tensors with a history stay as they are: gradients may need them.
        fits = held is not None and _fits(held, new) and held.is_inference() and not new.requires_grad
        if held is not None and fits:
            with torch.inference_mode():
                held[:, :, : new.shape[2]] = new
            return
        store[layer] = new.clone(memory_format=torch.contiguous_format) if copy else new.contiguous()
        self.bound = None

    def _map_batch(self, change: Any) -> None:
        """Apply `change`, a function of tensors along the batch, to everything held."""
        for layer, state in self.lightning.items():
            self._put(self.lightning, layer, change(state))
        for store in (self.keys, self.values):
            for layer, held in store.items():
                self._put(store, layer, change(held[:, :, : self.length]))
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
        self.lightning, self.keys, self.values = {}, {}, {}
        self.length, self.valid, self.bound, self.broken = 0, None, None, False

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


def _fits(held: Tensor, new: Tensor) -> bool:
    """True if `new` is all of `held` but perhaps for fewer places along the third axis."""
    alike = (held.shape[:2], held.shape[3:], held.dtype, held.device)
    return alike == (new.shape[:2], new.shape[3:], new.dtype, new.device) and new.shape[2] <= held.shape[2]
