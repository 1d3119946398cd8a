"""Imports point one way, heavy ones are lazy, and our packages have one name each."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Who may import whom: cli -> calibrate -> runtime -> quantize; skipping is fine, turning back is not.
ORDER = ("quantize", "runtime", "calibrate", "cli")
SCRIPTS = ("benchmarks", "tools", "tests")
GPU_LANGUAGES = ("triton", "cuda", "cupy", "pycuda", "numba")


def python_files(folder: str) -> list[Path]:
    return sorted(path for path in (ROOT / folder).rglob("*.py") if "__pycache__" not in path.parts)


def imported(source: str, package: str = "") -> Iterator[tuple[str, int]]:
    """Dotted names that `source` imports, `from a import b` as `a.b`, wherever in the file; with line numbers.

    `package` is the package that holds the file, for resolving relative imports. `importlib.import_module("x")`
    and `__import__("x")` with a literal count too.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.args[0].value, node.lineno


def package_of(path: Path) -> str:
    """The dotted package that holds `path`: quantize/x.py is in minibble.quantize."""
    parts = path.relative_to(ROOT).parent.parts
    return ".".join(parts if parts[0] == "minibble" else ("minibble", *parts))


def backward(folder: str, source: str, package: str) -> list[str]:
    """Imports of `source`, a file of `folder`, that turn back."""
    later = ORDER[ORDER.index(folder) + 1 :]
    return [
        f"line {line}: {name}"
        for name, line in imported(source, package)
        if name.startswith("minibble.") and name.split(".")[1] in later
    ]


def bare(source: str, package: str) -> list[str]:
    """Imports of our folders by their bare names, which would make a second module object."""
    return [f"line {line}: {name}" for name, line in imported(source, package) if name.split(".")[0] in ORDER]


@pytest.mark.parametrize("folder", ORDER)
def test_imports_point_one_way(folder: str) -> None:
    files = python_files(folder)
    assert files, f"no Python in {folder}/"
    found = {str(path): backward(folder, path.read_text("utf-8"), package_of(path)) for path in files}
    assert not {path: lines for path, lines in found.items() if lines}


@pytest.mark.parametrize("folder", [*ORDER, "minibble", *SCRIPTS])
def test_no_bare_imports(folder: str) -> None:
    found = {str(path): bare(path.read_text("utf-8"), package_of(path)) for path in python_files(folder)}
    assert not {path: lines for path, lines in found.items() if lines}


@pytest.mark.parametrize("folder", [*ORDER, "minibble"])
def test_gpu_languages_stay_with_the_kernels(folder: str) -> None:
    kernels = ROOT / "runtime" / "kernels"
    for path in python_files(folder):
        if kernels in path.parents:
            continue
        names = [name for name, _ in imported(path.read_text("utf-8"), package_of(path))]
        assert not [name for name in names if name.split(".")[0] in GPU_LANGUAGES], path


def test_quantize_never_imports_transformers() -> None:
    for path in python_files("quantize"):
        names = [name for name, _ in imported(path.read_text("utf-8"), package_of(path))]
        assert not [name for name in names if name.split(".")[0] == "transformers"], path


@pytest.mark.parametrize(
    ("source", "breach"),
    [
        ("from minibble.runtime import loading", True),
        ("import minibble.cli.main", True),
        ("def f():\n    from minibble.runtime.model import X", True),
        ("from ..runtime import model", True),
        ("from .. import runtime", True),
        ("import importlib\nimportlib.import_module('minibble.cli')", True),
        ("from minibble import calibrate", True),
        ("from minibble.quantize import nf4", False),
        ("from . import nf4", False),
        ("import torch", False),
    ],
)
def test_the_check_itself(source: str, breach: bool) -> None:
    assert bool(backward("quantize", source, "minibble.quantize")) == breach


def test_the_check_of_bare_imports_itself() -> None:
    assert bare("import quantize.nf4", "")
    assert bare("def f():\n    from runtime import model", "")
    assert not bare("from minibble.quantize import nf4", "")
    assert not bare("from .quantize import nf4", "minibble")


def modules_after(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint('\\n'.join(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    return set(result.stdout.split())


def test_import_minibble_is_light() -> None:
    loaded = modules_after("import minibble; minibble.__version__")
    heavy = {"torch", "transformers", "bitsandbytes", "safetensors", "triton", "numpy", "rich", "click"}
    assert not loaded & heavy


def test_command_line_help_is_light() -> None:
    """`minibble --help` answers before torch could be imported."""
    statement = "from click.testing import CliRunner; from minibble.cli.main import main; "
    statement += "assert CliRunner().invoke(main, ['--help']).exit_code == 0"
    assert not modules_after(statement) & {"torch", "transformers", "bitsandbytes", "triton"}


def test_folders_are_one_module_object() -> None:
    """From the repository root as from elsewhere, the root folders are the sub-packages of minibble."""
    import minibble.quantize.errors
    import minibble.runtime

    assert Path(minibble.quantize.errors.__file__ or "").parent == ROOT / "quantize"
    assert Path(minibble.runtime.__file__ or "").parent == ROOT / "runtime"


def test_every_package_is_installed() -> None:
    """A wheel holds the packages that pyproject.toml names; an editable install would not miss one."""
    named = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {"minibble"}
    for folder in ("quantize", "runtime", "calibrate", "cli"):
        for path in (ROOT / folder).rglob("__init__.py"):
            found.add(".".join(("minibble", *path.parent.relative_to(ROOT).parts)))
    assert named == found
