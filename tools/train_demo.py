"""Trains the built-in model on one GPU: several teachers, then a student that learns from the text and from them.

    python tools/demo_corpus.py CORPUS
    python tools/train_demo.py CORPUS OUT [--teachers 4] [--steps 4000] [--minutes 5]
    python tools/check_demo.py OUT CORPUS          # the runtime's model, held-out perplexity, README.md

The corpus is small, so a model alone overfits it: teachers of the same size, with other seeds and strong weight decay
and dropout, are averaged, and the student matches their predictions as well as the text. Checkpoints are chosen by
dev.txt. OUT gets the bf16 checkpoint in the released tensor names, the tokenizer's files and training.json.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from demo_net import DemoNet, NetConfig
from demo_save import save_checkpoint
from demo_training import Corpus, Recipe, teach, train


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("corpus", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--teachers", type=int, default=4)
    parser.add_argument("--teacher-steps", type=int, default=1400)
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="steps of the student")
    parser.add_argument("--minutes", type=float, help="fewer student steps where more would take longer than this")
    parser.add_argument("--batch", type=int, default=Recipe.batch)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def affordable_steps(options: argparse.Namespace, records: dict[str, dict], elapsed_s: float) -> int:
    """The student's steps: as asked, or what the rest of the time allows at a teacher's speed and a tenth."""
    if options.minutes is None or not records:
        return options.steps
    last = next(reversed(records.values()))["history"][-1]
    step_s = last["elapsed_s"] / last["step"]
    return max(1, min(options.steps, int((options.minutes * 60 - elapsed_s) / (1.1 * step_s))))


def main() -> None:
    options, start = parse(), time.perf_counter()
    torch.set_float32_matmul_precision("high")
    corpus = Corpus.load(options.corpus, options.device)
    wrap = torch.compile if options.device == "cuda" else lambda net: net
    config, recipe = NetConfig(), Recipe(batch=options.batch)
    teachers: list[DemoNet] = []
    records: dict[str, dict] = {}
    for seed in range(1, options.teachers + 1):
        name, own = f"teacher {seed}", replace(recipe, steps=options.teacher_steps, seed=seed)
        net, records[name] = train(name, config, own, corpus, wrap)
        teachers.append(net)
    if teachers:
        teach(teachers, corpus.prose, recipe.window)
        teach(teachers, corpus.source, recipe.window)
    elapsed = time.perf_counter() - start
    recipe = replace(recipe, steps=affordable_steps(options, records, elapsed))
    print(f"student: {recipe.steps} steps after {elapsed:.1f} s", flush=True)
    student, records["student"] = train("student", config, recipe, corpus, wrap)
    save_checkpoint(student, options.corpus / "tokenizer.json", options.out)
    device = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    made = {
        "recipe": asdict(recipe),
        "runs": records,
        "elapsed_s": round(time.perf_counter() - start, 1),
        "device": device,
        "torch": torch.__version__,
        "corpus": json.loads((options.corpus / "corpus.json").read_text()),
    }
    (options.out / "training.json").write_text(json.dumps(made, indent=1) + "\n")
    print(f"{made['elapsed_s']} s in all")


if __name__ == "__main__":
    main()
