"""The bookkeeping of slots against a list kept in order."""

from hypothesis import given, settings
from hypothesis import strategies as st

from minibble.runtime.experts.slots import Slots
from minibble.runtime.experts.tiering import Key

OPS = st.lists(
    st.tuples(st.sampled_from(["give", "give", "give", "touch", "drop", "hold", "free"]), st.integers(0, 5)),
    min_size=20,
    max_size=60,
)


@settings(max_examples=200, deadline=None)
@given(OPS, st.integers(1, 5))
def test_least_recently_used(ops: list[tuple[str, int]], count: int) -> None:
    slots = Slots(count)
    order: list[Key] = []  # present, least recently used first
    for op, number in ops:
        key = (number % 2, number)
        slot = slots.find(key)
        assert (slot is None) == (key not in order)
        if op == "give" and slot is None:
            victim = slots.victim()
            held = {slots.keys[held] for held in slots.held}
            loose = [one for one in order if one not in held]
            if len(order) < count:
                assert victim is not None and slots.keys[victim] is None
            elif not loose:
                assert victim is None
                continue
            else:
                assert victim is not None and slots.drop(victim) == loose[0]
                order.remove(loose[0])
            slots.give(victim, key)
            order.append(key)
        elif slot is not None and op == "touch":
            slots.touch(slot)
            order.remove(key)
            order.append(key)
        elif slot is not None and op == "drop":
            assert slots.drop(slot) == key and slot not in slots.held
            order.remove(key)
        elif slot is not None and op == "hold":
            slots.held.add(slot)
            assert slot in slots.held_of(key[0]) and slot not in slots.held_of(1 - key[0])
        elif slot is not None and op == "free":
            slots.held.discard(slot)
        assert sorted(slots.present) == sorted(order)
        assert all(slots.keys[place] == one for one in order if (place := slots.find(one)) is not None)


def test_what_is_to_be_kept_is_no_victim() -> None:
    slots = Slots(3)
    for slot in range(3):
        slots.give(slot, (0, slot))
    slots.held.add(1)
    assert slots.victim({0}) == 2 and slots.victim({0, 2}) is None
