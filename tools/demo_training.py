"""How one model of the built-in kind is trained: windows of the corpus, AdamW, and teachers' predictions as targets.

Shapes: B windows, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from demo_net import DemoNet, NetConfig
from tokenizers import Tokenizer
from torch import Tensor

EVAL_WINDOW = 512


@dataclass(frozen=True)
class Recipe:
    """How one model is trained; `prose` is the share of documentation windows at the start and at the end.

    Chosen by dev loss after 900 steps without teachers: 2.91 with weight decay 0.5 and dropout 0.1, 2.80 with weight
    decay 1.5, 2.81 with dropout 0.2.
    """

    steps: int = 4000
    batch: int = 32
    window: int = 1024
    rate: float = 3e-3
    weight_decay: float = 1.5
    dropout: float = 0.2
    prose: tuple[float, float] = (0.3, 0.7)
    balance: float = 0.01
    warmup: int = 100
    check_every: int = 250
    teacher_weight: float = 0.7
    seed: int = 0


@dataclass
class Stream:
    """One text as tokens int64 [S], and, once teachers have read it, their predictions bfloat16 [S-1,V]."""

    tokens: Tensor
    taught: Tensor | None = None


@dataclass
class Corpus:
    prose: Stream
    source: Stream
    dev: Tensor
    heldout: Tensor

    @staticmethod
    def load(folder: Path, device: str) -> Corpus:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        names = ("prose.txt", "source.txt", "dev.txt", "heldout.txt")
        prose, source, dev, heldout = (encoded(tokenizer, folder / name).to(device) for name in names)
        return Corpus(Stream(prose), Stream(source), dev, heldout)


def encoded(tokenizer: Tokenizer, path: Path, end: str = "<|endoftext|>") -> Tensor:
    """Tokens of a file of documents, encoded one by one in parallel: the end token splits the text anyway."""
    documents = [document + end for document in path.read_text().split(end)[:-1]]
    return torch.tensor([token for one in tokenizer.encode_batch(documents) for token in one.ids])


@dataclass
class Windows:
    """Windows of one stream in random order: every epoch starts at a new offset and visits each window once."""

    stream: Stream
    window: int
    generator: torch.Generator
    order: Tensor = field(init=False)
    seen: int = 0

    def __post_init__(self) -> None:
        self.order = torch.empty(0, dtype=torch.long, device=self.stream.tokens.device)

    def take(self, count: int) -> Tensor:
        """Positions [count, window + 1] in the stream; they stay on its device, where a copy a step would stall."""
        device = self.stream.tokens.device
        while len(self.order) < count:
            offset = int(torch.randint(self.window, (), generator=self.generator))
            starts = torch.arange(offset, len(self.stream.tokens) - self.window - 1, self.window)
            starts = starts[torch.randperm(len(starts), generator=self.generator)]
            self.order = torch.cat((self.order, starts.to(device)))
        starts, self.order = self.order[:count], self.order[count:]
        self.seen += count * self.window
        return starts[:, None] + torch.arange(self.window + 1, device=device)

    @property
    def epochs(self) -> float:
        return self.seen / len(self.stream.tokens)


def autocast(device: str) -> torch.autocast:
    return torch.autocast(device, torch.bfloat16, enabled=device == "cuda")


@torch.no_grad()
def loss_of(net: DemoNet, tokens: Tensor) -> tuple[float, Tensor]:
    """Mean next-token loss over whole windows of 512 tokens, in float32, and the expert shares [L,E]."""
    net.eval()
    windows = tokens[: len(tokens) // EVAL_WINDOW * EVAL_WINDOW].view(-1, EVAL_WINDOW)
    total, shares = 0.0, []
    for batch in windows.split(32):
        logits, _, share = net(batch)
        total += F.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
        shares.append(share * len(batch))
    net.train()
    return total / windows[:, 1:].numel(), torch.stack(shares).sum(0) / len(windows)


def rate_at(step: int, recipe: Recipe) -> float:
    """Linear warmup, then linear decay to nothing."""
    warmup = min(recipe.warmup, max(1, recipe.steps // 10))
    return min((step + 1) / warmup, (recipe.steps - step) / max(1, recipe.steps - warmup))


def objective(logits: Tensor, targets: Tensor, taught: Tensor | None, teacher_weight: float) -> Tensor:
    """Cross entropy with the text, mixed with cross entropy with the teachers' mean probabilities [B,T,V]."""
    text = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    if taught is None:
        return text
    return (1 - teacher_weight) * text - teacher_weight * (taught * logits.log_softmax(-1)).sum(-1).mean()


@torch.no_grad()
def teach(teachers: list[DemoNet], stream: Stream, window: int) -> None:
    """Sets `stream.taught` to the teachers' mean next-token probabilities, each with half a window of context."""
    tokens, half = stream.tokens, window // 2
    taught = torch.zeros(len(tokens) - 1, teachers[0].c.vocab, dtype=torch.bfloat16, device=tokens.device)
    last = len(tokens) - 1 - window
    starts = torch.tensor([*range(0, last, half), last], device=tokens.device)
    for part in starts.split(32):
        index = part[:, None] + torch.arange(window, device=tokens.device)
        with autocast(tokens.device.type):
            mean = torch.stack([teacher(tokens[index])[0].softmax(-1) for teacher in teachers]).mean(0).bfloat16()
        if part[0] == 0:
            taught[:half] = mean[0, :half]
        taught[index[:, half:].flatten()] = mean[:, half:].flatten(0, 1)
    stream.taught = taught


class Batches:
    """Batches that shift from source code to documentation as training goes on."""

    def __init__(self, recipe: Recipe, corpus: Corpus) -> None:
        generator = torch.Generator().manual_seed(recipe.seed)
        self.recipe = recipe
        self.prose, self.source = (Windows(s, recipe.window, generator) for s in (corpus.prose, corpus.source))

    def at(self, step: int) -> tuple[Tensor, Tensor | None]:
        """Tokens [B,T+1] and the teachers' predictions [B,T,V], float32, if there are any."""
        first, last = self.recipe.prose
        count = round(self.recipe.batch * (first + (last - first) * step / self.recipe.steps))
        parts = [(self.prose, self.prose.take(count)), (self.source, self.source.take(self.recipe.batch - count))]
        tokens = torch.cat([windows.stream.tokens[index] for windows, index in parts])
        taught = [w.stream.taught[index[:, :-1]] for w, index in parts if w.stream.taught is not None]
        return tokens, torch.cat(taught).float() if taught else None


def optimizer_for(net: DemoNet, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW, weight decay on matrices alone."""
    groups = [
        {"params": [p for p in net.parameters() if p.ndim == 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in net.parameters() if p.ndim != 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.rate, betas=(0.9, 0.95), fused=net.head.is_cuda)


def train(
    name: str, config: NetConfig, recipe: Recipe, corpus: Corpus, wrap: Callable[[DemoNet], Callable] = lambda net: net
) -> tuple[DemoNet, dict]:
    """A trained model, its best checkpoint by dev loss restored, and the record of the run.

    `wrap` may replace the model's forward in training (torch.compile).
    """
    device = corpus.dev.device.type
    batches = Batches(recipe, corpus)
    net = DemoNet(config, recipe.seed, recipe.dropout).to(device).train()
    forward, optimizer = wrap(net), optimizer_for(net, recipe)
    best, best_state, history, start = math.inf, {}, [], time.perf_counter()
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate * rate_at(step, recipe)
        tokens, taught = batches.at(step)
        with autocast(device):
            logits, aux, _ = forward(tokens[:, :-1])
        loss = objective(logits, tokens[:, 1:], taught, recipe.teacher_weight)
        optimizer.zero_grad()
        (loss + recipe.balance * aux).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % recipe.check_every == 0 or step + 1 == recipe.steps:
            dev, elapsed = loss_of(net, corpus.dev)[0], time.perf_counter() - start
            history.append({"step": step + 1, "train": loss.item(), "dev": dev, "elapsed_s": elapsed})
            print(f"{name} step {step + 1} train {loss.item():.4f} dev {dev:.4f} {elapsed:.1f} s", flush=True)
            if dev < best:
                best, best_state = dev, {key: value.detach().clone() for key, value in net.state_dict().items()}
    net.load_state_dict(best_state)
    epochs = {"prose": batches.prose.epochs, "source": batches.source.epochs}
    return net.eval(), {"steps": recipe.steps, "dev_loss": best, "epochs": epochs, "history": history}
