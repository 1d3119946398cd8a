"""CUDA C++: that every kernel compiles, without a GPU, and what becomes of those that do not."""

import ctypes
import re
from pathlib import Path

import pytest
import torch
from golden.kernel_checks import compiled, needs_nvrtc

from minibble.quantize.errors import MinibbleError
from minibble.runtime.kernels import nvrtc
from minibble.runtime.kernels.lightning import by_hand
from minibble.runtime.kernels.linear4 import decoded, few, skinny, slices, tile

# Flags, columns of a scale, tokens of a tile.
TILES = [
    ({"NF4", "NESTED"}, 64, 256),
    ({"NF4", "NESTED", "SCALED"}, 64, 256),
    ({"NF4", "NESTED", "GROUPED", "SILU"}, 64, 128),
    ({"NF4", "OUT_FLOAT"}, 64, 16),
    ({"GROUPED", "SCATTERED", "SCALED"}, 128, 64),
    (set(), 32, 32),
]


@needs_nvrtc
@pytest.mark.parametrize(("flags", "columns", "tokens"), TILES)
def test_many_tokens(flags: set[str], columns: int, tokens: int) -> None:
    assert b"tile4" in compiled(tile._compiled(frozenset(flags), columns, tokens), "sm_90a")


@needs_nvrtc
@pytest.mark.parametrize("arch", ["sm_90a", "compute_80"])
@pytest.mark.parametrize("variant", [(True, True, 64), (True, False, 64), (False, False, 128), (False, False, 32)])
def test_decoding(arch: str, variant: tuple[bool, bool, int]) -> None:
    assert b"decode_tiles" in compiled(decoded._decode_kernel(*variant), arch)


@needs_nvrtc
def test_lightning() -> None:
    for kernel in by_hand._kernels(64):
        assert kernel.name.encode() in compiled(kernel, "sm_90a")


@needs_nvrtc
def test_what_does_not_compile_is_named() -> None:
    with pytest.raises(nvrtc.KernelError, match=r"wrong\.cu cannot be compiled for sm_90a:\n.*wrong\.cu\(1\)"):
        nvrtc._compile("__global__ void f() { undefined(); }", "wrong.cu", (), "sm_90a")
    assert issubclass(nvrtc.KernelError, MinibbleError)


def test_compiled_code_is_kept_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIBBLE_CACHE", str(tmp_path / "cache"))
    path = nvrtc._cache_folder() / "kernel"
    assert "kept in" in nvrtc._keep(path, b"code") and path.read_bytes() == b"code"
    assert [file.name for file in path.parent.iterdir()] == ["kernel"], "a part is left"
    (tmp_path / "file").write_text("")
    assert "not kept" in nvrtc._keep(tmp_path / "file" / "kernel", b"code")


def test_where_compiled_code_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MINIBBLE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert nvrtc._cache_folder() == tmp_path / "minibble"


@pytest.mark.parametrize(
    ("capability", "expected"), [((8, 0), "sm_80"), ((8, 9), "sm_89"), ((9, 0), "sm_90a"), ((12, 0), "sm_120a")]
)
def test_architectures(capability: tuple[int, int], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    nvrtc.architecture.cache_clear()
    assert nvrtc.architecture(0) == expected
    monkeypatch.setenv("MINIBBLE_CUDA_ARCH", "compute_80")
    nvrtc.architecture.cache_clear()
    assert nvrtc.architecture(0) == "compute_80"
    nvrtc.architecture.cache_clear()


def test_arguments() -> None:
    assert isinstance(nvrtc._value(3), ctypes.c_int) and isinstance(nvrtc._value(3.0), ctypes.c_float)
    tensor = torch.zeros(1)
    assert nvrtc._value(tensor).value == tensor.data_ptr()
    with pytest.raises(AssertionError, match="64 bits"):
        nvrtc._value(1 << 31)


@pytest.mark.parametrize(
    ("source", "name", "ours"),
    [
        ("skinny_shape.cuh", "Args", skinny._Args),
        ("slices_shape.cuh", "Args", slices._Args),
        ("few_codes.cuh", "Codes", few.Codes),
    ],
)
def test_arguments_are_laid_out_as_in_the_source(source: str, name: str, ours: type[ctypes.Structure]) -> None:
    """Names and order of the structures that kernels take by value."""
    text = (Path(skinny.__file__).parent / source).read_text()
    start = text.index(f"struct {name} {{") + len(f"struct {name} {{")
    body = re.sub(r"//.*", "", text[start : text.index("};", start)])
    names = []
    for declaration in filter(None, (part.strip() for part in body.split(";"))):
        kind = re.match(r"(const )?(unsigned short|float|int|char|long long|Codes)", declaration)
        assert kind, declaration
        names += [re.sub(r"[\s*]|\[.*?\]", "", name) for name in declaration[kind.end() :].split(",")]
    assert names == [field[0] for field in ours._fields_]
