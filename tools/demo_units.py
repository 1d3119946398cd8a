"""What this Python documents: topics, modules, classes and functions of the standard library, as plain text."""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import re
import sys
import sysconfig
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data import topics

SKIPPED_FOLDERS = {
    "site-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data", "ensurepip",
    "turtledemo", "__phello__", "lib-dynload", "__pycache__",
}  # fmt: skip
SKIPPED_FILES = {"html/entities.py", "stringprep.py", "this.py", "antigravity.py"}
MAX_SOURCE = 24_000  # characters of one unit's source; what is longer is cut
QUESTIONS = {
    "topic": ("What does the documentation say about {}?",),
    "module": ("What is the module {} for?", "What is {}?", "Tell me about the module {}."),
    "class": ("What is {}?", "What is the class {} for?", "Explain {}."),
    "function": ("What does {} do?", "What does {}() do?", "Explain {}."),
}
Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass
class Unit:
    """One documented thing and the texts made of it; `chats` are pairs of a question and its answer."""

    name: str
    doc: str = ""
    source: str = ""
    chats: list[tuple[str, str]] = field(default_factory=list)


def all_units() -> Iterator[Unit]:
    """Every unit in a fixed order: topics, modules written in Python, modules written in C."""
    yield from topic_units()
    for name, path in modules(Path(sysconfig.get_paths()["stdlib"])):
        yield from module_units(name, path)
    yield from compiled_units()


def clean(text: str) -> str:
    """Without tabs, form feeds, trailing blanks and runs of empty lines."""
    text = text.expandtabs(8).replace("\r", "").replace("\f", "")
    text = "\n".join(line.rstrip() for line in text.split("\n"))
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n")


def prose(text: str) -> bool:
    """Whether a text is worth learning: mostly letters, not a table of numbers."""
    letters = sum(c.isalpha() or c == " " for c in text)
    return len(text) >= 25 and letters / len(text) > 0.6


def entry(signature: str, doc: str | None, indent: int = 0) -> str:
    """The signature, then the docstring three columns in, as the documentation topics have it."""
    body = textwrap.indent(clean(inspect.cleandoc(doc)), "   ") if doc else ""
    return textwrap.indent(signature + ("\n\n" + body if body else ""), " " * indent)


def question(name: str, kind: str, doc: str | None) -> list[tuple[str, str]]:
    """A question about a documented thing and the first paragraph of its docstring; nothing if that is no prose."""
    if not doc:
        return []
    answer = " ".join(clean(inspect.cleandoc(doc)).split("\n\n")[0].split())
    if not 30 <= len(answer) <= 500 or not prose(answer) or ">>>" in answer or re.match(r"[\w.]+\(", answer):
        return []
    forms = QUESTIONS[kind]
    return [(forms[int(hashlib.sha256(name.encode()).hexdigest(), 16) % len(forms)].format(name), answer)]


def topic_units() -> Iterator[Unit]:
    """The documentation topics, longest first: of a topic that is part of another one, the copy is dropped later."""
    for name, text in sorted(topics.topics.items(), key=lambda item: (-len(item[1]), item[0])):
        first = next((p for p in clean(text).split("\n\n")[1:] if len(p) > 80 and "**" not in p), None)
        yield Unit(f"topic:{name}", doc=clean(text), chats=question(name, "topic", first))


# ---- modules written in Python --------------------------------------------------------------------


def modules(root: Path) -> Iterator[tuple[str, Path]]:
    """Dotted names and files of the standard library's modules, in a fixed order."""
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if any(p in SKIPPED_FOLDERS or p.startswith(("test", "config-")) for p in parts[:-1]):
            continue
        if "/".join(parts) in SKIPPED_FILES or parts[-1].startswith("_sysconfigdata"):
            continue
        yield ".".join(parts)[:-3].removesuffix(".__init__"), path


def module_units(module: str, path: Path) -> Iterator[Unit]:
    """The module's overview, then a unit for every top-level class and function."""
    text = path.read_text(encoding="utf-8", errors="replace")
    tree = ast.parse(text)
    lines = text.split("\n")
    overview = ast.get_docstring(tree)
    doc = entry(f"module {module}", overview) if overview else ""
    yield Unit(f"module:{module}", doc, between_definitions(module, tree, lines), question(module, "module", overview))
    for node in tree.body:
        if isinstance(node, Definition):
            unit = definition_unit(f"{module}.{node.name}", node, lines)
            if unit.doc or unit.source:
                yield unit


def definition_unit(name: str, node: Definition, lines: list[str]) -> Unit:
    kind = "class" if isinstance(node, ast.ClassDef) else "function"
    own = ast.get_docstring(node)
    entries = [entry(signature(node, name), own)]
    chats = question(name, kind, own)
    for inner in node.body if kind == "class" else []:
        if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef) and (doc := ast.get_docstring(inner)):
            entries.append(entry(signature(inner, inner.name), doc, indent=3))
            chats += question(f"{name}.{inner.name}", "function", doc)
    documented = own or len(entries) > 1
    source = without_docstrings(node, lines)[:MAX_SOURCE]
    source = f"# {name.rpartition('.')[0]}\n\n{source}" if prose(source) else ""
    return Unit(name, "\n\n".join(entries) if documented else "", source, chats)


def between_definitions(module: str, tree: ast.Module, lines: list[str]) -> str:
    """A module's own statements and comments: what is left without its docstring, classes and functions."""
    docstring = tree.body[:1] if ast.get_docstring(tree) is not None else []
    taken = [node for node in tree.body if isinstance(node, Definition)] + docstring
    dropped = {number for node in taken for number in range(node.lineno, (node.end_lineno or node.lineno) + 1)}
    source = clean("\n".join(line for number, line in enumerate(lines, 1) if number not in dropped))[:MAX_SOURCE]
    return f"# {module}\n\n{source}" if prose(source) and len(source) > 200 else ""


def signature(node: Definition, name: str) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {name}({bases})" if bases else f"class {name}"
    text = f"{name}({ast.unparse(node.args)})"
    return text if len(text) < 200 else f"{name}(...)"


def without_docstrings(node: Definition, lines: list[str]) -> str:
    """The source of a definition, comments included and docstrings not; empty when little else is in it."""
    dropped: set[int] = set()
    for scope in ast.walk(node):
        if isinstance(scope, Definition) and ast.get_docstring(scope) is not None:
            first = scope.body[0]
            dropped |= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    end = node.end_lineno or start
    kept = [lines[number - 1] for number in range(start, end + 1) if number not in dropped]
    return clean("\n".join(kept)) if len(kept) > 3 else ""


# ---- modules written in C -------------------------------------------------------------------------


def compiled_units() -> Iterator[Unit]:
    """Docstrings of the modules that have no source here, through their attributes."""
    dynamic = Path(sysconfig.get_paths()["platstdlib"]) / "lib-dynload"
    names = {*sys.builtin_module_names, *(path.name.split(".")[0] for path in dynamic.glob("*.so"))}
    for name in sorted(names):
        if "test" in name or name.startswith(("_xx", "xx", "_sysconfigdata")):
            continue
        try:
            module = importlib.import_module(name)
        except ImportError:  # a module whose C library this machine lacks documents nothing
            continue
        public = name.lstrip("_")
        if overview := inspect.getdoc(module):
            doc = entry(f"module {public}", overview)
            yield Unit(f"module:{name}", doc, "", question(public, "module", overview))
        for attribute, value in sorted(vars(module).items()):
            home = getattr(value, "__module__", None) or name
            documented = inspect.isclass(value) or inspect.isbuiltin(value)
            if documented and not attribute.startswith("_") and home.lstrip("_") == public:
                yield from compiled_unit(public, attribute, value)


def compiled_unit(module: str, name: str, value: object) -> Iterator[Unit]:
    full = name if module == "builtins" else f"{module}.{name}"
    members = sorted(vars(value).items()) if inspect.isclass(value) else []
    own = vars(value).get("__doc__") if inspect.isclass(value) else getattr(value, "__doc__", None)
    own = own if isinstance(own, str) else None
    entries = [entry(heading(full, value), own)]
    chats = question(full, "class" if inspect.isclass(value) else "function", own)
    for attribute, member in members:
        doc = getattr(member, "__doc__", None)
        if callable(member) and isinstance(doc, str) and doc and not attribute.startswith("__"):
            entries.append(entry(heading(attribute, member), doc, indent=3))
            chats += question(f"{full}.{attribute}", "function", doc)
    if own or len(entries) > 1:
        yield Unit(f"{module}.{name}", "\n\n".join(entries), "", chats)


def heading(name: str, value: object) -> str:
    keyword = "class " if inspect.isclass(value) else ""
    try:
        return f"{keyword}{name}{inspect.signature(value)}"  # type: ignore[arg-type]
    except (ValueError, TypeError):
        return f"{keyword}{name}" if keyword else f"{name}(...)"
