"""LoRA from scratch: layers written by hand, and their adapter saved, inspected and merged by loratool.

A classifier in plain torch learns to tell good from bad reviews of films. Reviews of cars use the same words, but an
unpredictable plot is praise and unpredictable steering is not: with its weights frozen, LoRA layers of twenty lines
learn that. Claimed and asserted: the base is left as it was, every layer has an adapter of its own, and the merged
model, which is the plain classifier again, answers as the one with LoRA layers does.

    python examples/from_scratch.py [-o DIR]
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import loratool

GOOD, BAD = ["superb", "lovely", "brilliant", "clever"], ["awful", "boring", "clumsy", "broken"]
DEPENDS = ["unpredictable", "slow", "loud", "dark", "heavy", "strange"]  # good in a film, bad in a car
FILM, CAR = ["plot", "scene", "ending", "villain"], ["steering", "engine", "brake", "gearbox"]
WORDS = {word: n for n, word in enumerate(["the", "is", "and", *GOOD, *BAD, *DEPENDS, *FILM, *CAR])}


def reviews(nouns: list[str], count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return sentences as word numbers, and whether each is praise."""
    choose = random.Random(seed)
    good, bad = (GOOD + DEPENDS, BAD) if nouns is FILM else (GOOD, BAD + DEPENDS)
    praise = [choose.random() < 0.5 for _ in range(count)]
    said = [choose.sample(good if p else bad, 2) for p in praise]
    texts = [f"the {choose.choice(nouns)} is {one} and {two}" for one, two in said]
    return torch.tensor([[WORDS[w] for w in text.split()] for text in texts]), torch.tensor(praise).long()


class Classifier(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(WORDS), width)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.head = nn.Linear(width, 2)

    def forward(self, words: Tensor) -> Tensor:
        x = self.embedding(words).mean(1)
        for layer in self.hidden:
            x = torch.relu(layer(x))
        return self.head(x)


class LoRALinear(nn.Module):
    """A frozen linear layer and an update of low rank, as many tutorials write it: alpha multiplies, undivided."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.linear, self.alpha = linear, alpha
        self.A = nn.Parameter(torch.randn(linear.in_features, rank) / linear.in_features**0.5)
        self.B = nn.Parameter(torch.zeros(rank, linear.out_features))  # so that training starts at the base

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.alpha * (x @ self.A @ self.B)


def add_lora(model: Classifier, rank: int, alpha: float) -> dict[str, LoRALinear]:
    """Freeze a model and wrap each of its linear layers; return the LoRA layers by the path of what they wrap."""
    model.requires_grad_(False)
    linear = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    # A much copied listing makes one pair of factors in this loop, under the same two names each time: only the last
    # layer keeps an adapter. It also takes the rank from the number of classes, `classes // 4`: 0 for two of them, and
    # an update that is always zero. A layer has factors of its own; the rank is a choice, and at most its smaller side.
    lora = {n: LoRALinear(x, min(rank, x.in_features, x.out_features), alpha) for n, x in linear.items()}
    for name, layer in lora.items():
        model.set_submodule(name, layer)
    return lora


def fit(model: nn.Module, words: Tensor, labels: Tensor, steps: int) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(words), labels).backward()
        optimizer.step()


def right(model: nn.Module, words: Tensor, labels: Tensor) -> float:
    return (model(words).argmax(1) == labels).float().mean().item()


def main(folder: Path, steps: int) -> None:
    def run(*words: str) -> None:
        print(f"\n$ loratool {' '.join(words)}", flush=True)
        subprocess.run([sys.executable, "-m", "loratool", *words], cwd=folder, check=True)

    torch.manual_seed(0)
    films, cars, unseen = reviews(FILM, 512, seed=1), reviews(CAR, 512, seed=2), reviews(CAR, 512, seed=3)
    model = Classifier()
    fit(model, *films, steps)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    (folder / "base").mkdir()
    save_file(base, folder / "base/model.safetensors")
    (folder / "base/config.json").write_text(json.dumps({"model_type": "review_classifier"}))
    before = right(model, *unseen)

    lora = add_lora(model, rank=4, alpha=2.0)
    fit(model, *cars, steps)
    after = right(model, *unseen)
    print(f"reviews of cars that are understood: {before:.0%} by the base, {after:.0%} with LoRA")
    assert after > before + 0.1, "the LoRA layers learnt nothing"
    assert all(layer.B.any() for layer in lora.values()), "a layer has no adapter"
    frozen = {n.replace(".linear.", "."): t for n, t in model.state_dict().items() if n.rpartition(".")[2] not in "AB"}
    assert all(frozen[name].equal(tensor) for name, tensor in base.items()), "training changed the base"

    # (in, rank) and (rank, out) are recognised by their shapes; scaling is whatever the layers multiply by
    adapter = loratool.from_factors({n: (x.A, x.B) for n, x in lora.items()}, scaling=2.0, base_model="base")
    loratool.convert(adapter, folder / "lora", to="peft")
    shutil.copy(Path(__file__).parent / "plugins/review_classifier.py", folder)
    run("inspect", "lora", "-p", "review_classifier.py")
    run("merge", "base", "lora", "-o", "merged", "-p", "review_classifier.py")

    merged = Classifier()
    merged.load_state_dict(load_file(folder / "merged/model.safetensors"))
    live, plain = model(unseen[0]), merged(unseen[0])
    print(f"\nlargest difference of logits, merged model to LoRA layers: {(live - plain).abs().max():.0e}")
    assert torch.allclose(live, plain, rtol=1e-4, atol=1e-4)
    assert live.argmax(1).equal(plain.argmax(1))
    print("all answers are the same")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, help="keep the files in this new folder")
    parser.add_argument("--tiny", action="store_true", help="fewer steps, for tests")
    arguments = parser.parse_args()
    if arguments.out and arguments.out.exists():
        parser.error(f"{arguments.out} exists: -o makes a new folder")
    with tempfile.TemporaryDirectory() as temporary:
        out = arguments.out or Path(temporary, "out")
        out.mkdir(parents=True)
        main(out.resolve(), 60 if arguments.tiny else 150)
