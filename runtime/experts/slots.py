"""Which expert lies in which spare slot, and which of them is the next to go: bookkeeping without any memory."""

from collections import OrderedDict
from collections.abc import KeysView, Set

from minibble.runtime.experts.tiering import Key


class Slots:
    """`count` slots, each free or one expert's; `held` are those that work in progress needs."""

    def __init__(self, count: int):
        self.keys: list[Key | None] = [None] * count
        self.held: set[int] = set()
        self._where: dict[Key, int] = {}
        self._order: OrderedDict[int, None] = OrderedDict.fromkeys(range(count))  # least recently used first

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def present(self) -> KeysView[Key]:
        """The experts that have a slot."""
        return self._where.keys()

    def find(self, key: Key) -> int | None:
        """The slot of an expert."""
        return self._where.get(key)

    def touch(self, slot: int) -> None:
        """Note that the slot was used just now."""
        self._order.move_to_end(slot)

    def victim(self, keep: Set[int] = frozenset()) -> int | None:
        """A free slot, else the one used least recently, never one that is held or in `keep`; None if there is none."""
        full = None not in self.keys
        for slot in self._order:
            if (full or self.keys[slot] is None) and slot not in self.held and slot not in keep:
                return slot
        return None

    def give(self, slot: int, key: Key) -> None:
        """Let a free slot be that of `key`."""
        assert self.keys[slot] is None and key not in self._where
        self.keys[slot], self._where[key] = key, slot
        self.touch(slot)

    def drop(self, slot: int) -> Key | None:
        """Free a slot; returns whose it was."""
        key = self.keys[slot]
        if key is not None:
            del self._where[key]
            self.keys[slot] = None
        self.held.discard(slot)
        return key

    def held_of(self, layer: int) -> list[int]:
        """The held slots with experts of `layer`."""
        return [slot for slot in self.held if (key := self.keys[slot]) is not None and key[0] == layer]
