"""Measures the trained built-in model with the runtime's own code and writes the README.md beside it.

    python tools/check_demo.py FOLDER CORPUS

Copies heldout.txt and calibration.txt from CORPUS into FOLDER, and the Python licence that their text is under. Fails
if the runtime's model and the one that was trained differ in loss, if an expert is starved, or if the tensors take more
than 16 MB.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sysconfig
from pathlib import Path

import torch
from demo_net import DemoNet, NetConfig
from demo_save import load_weights
from demo_training import loss_of

import minibble
from minibble.runtime.evaluate import evaluate

MAX_BYTES = 16_000_000
MIN_SHARE = 0.05
SAMPLES = (
    "The function returns",
    "class collections.",
    "<|im_start|>user\nWhat does the function open do?<|im_end|>\n<|im_start|>assistant\n",
)


def measure(folder: Path) -> dict:
    """Held-out loss by both models, bits per byte, expert shares, bytes; raises ValueError where one is not right."""
    evaluation = evaluate(folder, folder / "heldout.txt", device="cpu", dtype=torch.float32)
    text = (folder / "heldout.txt").read_text()
    tokens = torch.tensor(minibble.load(folder, device="cpu").tokenizer(text, verbose=False)["input_ids"])
    net = DemoNet(NetConfig()).eval()
    load_weights(net, folder)
    trained_loss, shares = loss_of(net, tokens)
    loss = math.log(evaluation.perplexity)
    nbytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if abs(loss - trained_loss) > 1e-3:
        raise ValueError(f"loss {loss:.5f} through the runtime, {trained_loss:.5f} as trained")
    if shares.min() < MIN_SHARE or nbytes > MAX_BYTES:
        raise ValueError(f"smallest expert share {shares.min():.3f}, shards of {nbytes} bytes")
    return {
        "tokens": evaluation.tokens,
        "perplexity": evaluation.perplexity,
        "bits_per_byte": loss / math.log(2) * len(tokens) / len(text.encode()),
        "parameters": sum(weight.numel() for _, weight in net.named_weights()),
        "nbytes": nbytes,
        "shares": shares.tolist(),
    }


def samples(folder: Path) -> list[str]:
    """Continuations at the folder's own generation settings."""
    model = minibble.load(folder, device="cpu")
    texts = []
    for prompt in SAMPLES:
        torch.manual_seed(0)
        ids = model.generate(model.tokenizer(prompt, return_tensors="pt")["input_ids"], max_new_tokens=80)
        texts.append(model.tokenizer.decode(ids[0]))
    return texts


README = """# The built-in model

A tiny trained MiniMax, so that every command has a real model to work on: {parameters:,} parameters in bfloat16
({nbytes:,} bytes), 8 layers (7 lightning, 1 softmax), hidden 256, 4 heads of 64 with rotary_dim 32, {experts} experts
of 128 with 2 active, alpha 2.0, vocabulary 2048 (byte-level BPE with a chat template). It writes text in the manner of
Python's documentation and knows nothing.

| measured on heldout.txt, float32, windows of 512 | |
|---|---|
| perplexity per token, {tokens:,} tokens | {perplexity:.2f} |
| bits per byte | {bits_per_byte:.3f} |
| experts' shares of the routed tokens, smallest to largest over all layers | {low:.1%} to {high:.1%} |

**Text.** What Python {python} carries: `pydoc_data.topics`, the docstrings of the standard library (also of the modules
written in C), questions and answers made of their first sentences, and source code without its docstrings. Whole
classes, functions and topics are held out by the hash of their name; held-out units that share more than a fifth of
their runs of eight words with the training text were dropped. `heldout.txt` ({heldout_bytes:,} bytes) is text the model
never saw, and did not choose its checkpoint by: evaluate on it, never calibrate on it. `calibration.txt` is training
text, for calibrating.

**Recipe.** `tools/demo_corpus.py`, `tools/train_demo.py`, `tools/check_demo.py`; settings and losses are in
`training.json`. {teachers}
AdamW, weight decay {weight_decay}, dropout {dropout}, {steps} steps of {batch} windows of {window} tokens,
learning rate {rate} falling linearly to nothing, load-balancing loss {balance}; {elapsed:.0f} s on one {device}.

**Licence.** The text is Python's own documentation, docstrings and source: Copyright © 2001-2023 Python Software
Foundation; All Rights Reserved; `LICENSE.python.txt` (PSF licence, version 2) covers heldout.txt and calibration.txt.
The weights were learnt from that text and are under the project's licence.

Samples, as its generation_config.json has it:

{samples}
"""


def readme(folder: Path, measured: dict, texts: list[str]) -> str:
    made = json.loads((folder / "training.json").read_text())
    teachers = len(made["runs"]) - 1
    taught = f"{teachers} teachers of the same size, whose mean prediction the model learns to match beside the text."
    shares = [share for layer in measured["shares"] for share in layer]
    return README.format(
        **measured,
        **made["recipe"],
        experts=len(measured["shares"][0]),
        low=min(shares),
        high=max(shares),
        python=made["corpus"]["python"],
        heldout_bytes=made["corpus"]["bytes"]["heldout.txt"],
        teachers=taught if teachers else "One model, without teachers.",
        elapsed=made["elapsed_s"],
        device=made["device"],
        samples="\n\n".join(f"```text\n{text}\n```" for text in texts),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("corpus", type=Path)
    options = parser.parse_args()
    for name in ("heldout.txt", "calibration.txt"):
        shutil.copyfile(options.corpus / name, options.folder / name)
    shutil.copyfile(Path(sysconfig.get_paths()["stdlib"]) / "LICENSE.txt", options.folder / "LICENSE.python.txt")
    measured = measure(options.folder)
    texts = samples(options.folder)
    (options.folder / "README.md").write_text(readme(options.folder, measured, texts))
    print(json.dumps(measured, indent=1))
    print("\n-----\n".join(texts))


if __name__ == "__main__":
    main()
