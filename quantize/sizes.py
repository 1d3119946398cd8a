"""Sizes in bytes, read and written with their units: GB is 1e9, GiB is 2**30."""

import re

from minibble.quantize.errors import ConfigError

_UNITS = {"": 1, "B": 1}
for _power, _prefix in enumerate("KMGT", start=1):
    _UNITS[f"{_prefix}B"] = 1000**_power
    _UNITS[f"{_prefix}IB"] = 1024**_power

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def parse_size(text: str) -> int:
    """Bytes meant by `text`, such as `228GB`, `228GiB`, `1.5 GiB` or `5000`; ConfigError if it is no size."""
    match = _SIZE.fullmatch(text)
    unit = match[2].upper() if match else None
    if match is None or unit not in _UNITS:
        raise ConfigError(f"'{text}' is not a size: write a number with a unit, such as 228GB or 228GiB")
    return int(float(match[1]) * _UNITS[unit])


def decimal(nbytes: float) -> str:
    """`nbytes` in powers of 1000: 239.0 GB."""
    return _scaled(nbytes, 1000, ("B", "kB", "MB", "GB", "TB"))


def binary(nbytes: float) -> str:
    """`nbytes` in powers of 1024: 222.6 GiB."""
    return _scaled(nbytes, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def _scaled(nbytes: float, base: int, units: tuple[str, ...]) -> str:
    for unit in units[:-1]:
        if abs(nbytes) < base * 0.99995:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= base
    return f"{nbytes:.1f} {units[-1]}"
