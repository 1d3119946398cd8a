"""Which layers and experts go where, as a table for people."""

from typing import TYPE_CHECKING

from minibble.quantize.sizes import decimal

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from minibble.runtime.planning.placement import DevicePlan, Placement

# Columns of bytes, and the parts of a GPU's plan that each one sums.
COLUMNS = {
    "weights": ("weights_bytes",),
    "records": ("experts_bytes",),
    "cache": ("kv_cache_bytes", "state_bytes"),
    "work": ("workspace_bytes", "reserve_bytes", "overhead_bytes"),
}
GB = 1e9


HEAD = ("layers", "experts\n(a layer)", "slots", *COLUMNS, "total", "free")


def renderables(placement: "Placement") -> "list[RenderableType]":
    """A row for each GPU, a line for host memory and disk, and what to expect."""
    return [_table(placement), *elsewhere(placement), expected_text(placement)]


def expected_text(placement: "Placement") -> str:
    """Hit rate and speed in one line."""
    batch = f" with {placement.batch:,} sequences" if placement.batch > 1 else ""
    return (
        f"expected: {100 * placement.expected_hit_rate:.1f} % of the experts' work on the GPUs that hold them, "
        f"{placement.expected_decode_tokens_per_s:.3g} tokens/s{batch}"
    )


def row(device: "DevicePlan") -> list[str]:
    """The GPU, and what belongs under each of HEAD, sizes in GB."""
    sizes = [sum(device.parts[part] for part in parts) for parts in COLUMNS.values()]
    sizes += [device.total_bytes, device.budget_bytes - device.total_bytes]
    fewest, most = min(map(len, device.resident)), max(map(len, device.resident))
    each = f"{fewest}" if fewest == most else f"{fewest}-{most}"
    counts = (f"{device.layers.start}-{device.layers.stop - 1}", f"{device.experts:,} ({each})", f"{device.slots}")
    return [device.device, *counts, *(f"{size / GB:.2f}" for size in sizes)]


def elsewhere(placement: "Placement") -> list[str]:
    """What host memory and disk hold, a line each if anything."""
    tiers = (("host memory", placement.pinned, placement.host_bytes), ("disk", placement.disk, placement.disk_bytes))
    lines = [f"{name}: {sum(map(len, ids)):,} experts, {decimal(nbytes)}" for name, ids, nbytes in tiers if nbytes]
    if placement.embedding_bytes:
        lines[0] += ", the embedding among them"
    return lines


def _table(placement: "Placement") -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    table.add_column("GPU\nin GB", no_wrap=True)
    for name in HEAD:
        table.add_column(f" {name}", justify="right", no_wrap=True, style="bold" if name == "total" else "")
    for device in placement.devices:
        table.add_row(*row(device))
    return table
