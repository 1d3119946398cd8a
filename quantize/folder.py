"""What lies in a checkpoint's folder: which shards, which other files to take along, and which paths are refused."""

import json
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from minibble.quantize.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CONFIG = "config.json"
MANIFEST = "minibble.json"
JOURNAL = ".minibble-journal.jsonl"

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_TAKEN = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*",
    "generation_config.json", "*preprocessor_config.json", "processor_config.json", "*.tiktoken", "LICENSE*",
    "NOTICE*", "USE_POLICY*",
)  # fmt: skip
_NEVER = (
    CONFIG, MANIFEST, "*.index.json", "quantize_config.json", "*.py", "*.pyc", "*.so", "*.safetensors", "*.gguf",
    "*.partial", ".*", *_PICKLES,
)  # fmt: skip
_MAX_OTHER_NBYTES = 16 << 20  # of JSON files that nobody knows: larger ones are data, not settings


def find_shards(folder: Path) -> tuple[dict[str, Path], dict[str, str] | None]:
    """The shards of `folder` by file name, and the index's weight_map (None for a single file without index)."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; give the folder that holds config.json and the shards")
    if (folder / INDEX).exists():
        weight_map = _weight_map(folder / INDEX)
        shards = {name: shard_path(folder, name) for name in sorted(set(weight_map.values()))}
        _refuse_leftovers(folder, shards)
        return shards, weight_map
    if (folder / SINGLE).exists():
        return {SINGLE: shard_path(folder, SINGLE)}, None
    raise CheckpointError(f"{folder}: {_why_nothing(folder)}")


def shard_path(folder: Path, name: str) -> Path:
    """`folder / name`, refused where it is no plain safetensors file name or leads out of the folder."""
    if not name.endswith(".safetensors"):
        raise CheckpointError(f"{folder / INDEX}: weight_map names {name!r}, expected a .safetensors file")
    if Path(name).name != name or "\\" in name or "\0" in name:
        raise CheckpointError(
            f"{folder / INDEX}: weight_map names {name!r}, expected a file of the folder itself; "
            "paths into other folders are never followed: do not trust this checkpoint"
        )
    path = folder / name
    if not path.is_file():
        raise CheckpointError(f"{folder}: shard {name} is missing; download it again")
    if not _stays_inside(folder, path):
        raise CheckpointError(
            f"{path}: is a link to {path.resolve()}, outside the checkpoint's folder; "
            "copy the file itself into the folder (cp -L)"
        )
    return path


def extra_files(folder: Path) -> list[Path]:
    """Tokenizer, chat template, generation config, licence and other small files that belong to the model.

    Code, pickles, weights and links out of the folder are never taken.
    """
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file()
        and _stays_inside(folder, path)
        and not any(fnmatch(path.name, pattern) for pattern in _NEVER)
        and (any(fnmatch(path.name, pattern) for pattern in _TAKEN) or _is_small_json(path))
    ]


def _is_small_json(path: Path) -> bool:
    return path.suffix == ".json" and path.stat().st_size <= _MAX_OTHER_NBYTES


def _stays_inside(folder: Path, path: Path) -> bool:
    """Whether `path` ends inside `folder`, or in the blobs of the Hugging Face cache that `folder` is part of.

    The cache keeps `models--org--name/snapshots/REVISION/FILE` as links into `models--org--name/blobs`.
    """
    home, target = folder.resolve(), path.resolve()
    if target.is_relative_to(home):
        return True
    cached = home.parent.name == "snapshots" and home.parents[1].name.startswith("models--")
    return cached and target.parent == home.parents[1] / "blobs"


def _weight_map(path: Path) -> dict[str, str]:
    try:
        index: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error}); download it again") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{path}: has no weight_map from tensor names to file names")
    return weight_map


def _refuse_leftovers(folder: Path, shards: dict[str, Path]) -> None:
    strays = sorted(path.name for path in folder.glob("model*.safetensors") if path.name not in shards)
    if strays:
        raise CheckpointError(
            f"{folder}: {strays[0]} is not in {INDEX} ({len(strays)} such files); "
            "two checkpoints may be mixed in this folder: remove what does not belong"
        )


def _why_nothing(folder: Path) -> str:
    if (folder / JOURNAL).exists():
        return "an unfinished quantization; finish it with `minibble quantize ... --resume`"
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        return (
            f"holds only pickled weights ({pickles[0]}); pickles can run code and are never read: "
            "convert the checkpoint to safetensors first"
        )
    return f"found neither {INDEX} nor {SINGLE}; give the folder of a safetensors checkpoint"
