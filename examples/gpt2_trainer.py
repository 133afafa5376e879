"""GPT-2, PEFT and the Trainer: from a `checkpoint-N` to a smaller adapter, and to a merged model that writes the same.

A small GPT-2 and its tokenizer learn Python code, of this project as it once was (text.txt); then PEFT puts a LoRA on
`c_attn` (rank 8, alpha 32, dropout 0.1, no biases), and transformers' Trainer trains it on the files of model families
alone, and saves as it goes. loratool takes the folder that the Trainer left. Claimed and asserted: the resized adapter
keeps the energy that was asked for; the merged model's logits are those of PEFT's live model, and greedy generation
writes the same tokens.

    python examples/gpt2_trainer.py [-o DIR]
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
warnings.filterwarnings("ignore", category=FutureWarning)

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    DataCollatorForLanguageModeling,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

import loratool

CODE, FAMILIES, _ = Path(__file__).with_name("text.txt").read_text().split("\f\n")
BLOCK = 64  # tokens in a sample


def tokenizer_for(corpus: str) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE, the kind that GPT-2 has."""
    end, trained = "<|endoftext|>", ByteLevelBPETokenizer()
    trained.train_from_iterator([corpus], vocab_size=512, special_tokens=[end], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, eos_token=end, pad_token=end)


def samples(tokenizer: PreTrainedTokenizerFast, corpus: str) -> list[dict[str, list[int]]]:
    tokens = tokenizer(corpus)["input_ids"]
    return [{"input_ids": tokens[at : at + BLOCK]} for at in range(0, len(tokens) - BLOCK, BLOCK)]


def train(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, corpus: str, out: Path, steps: int) -> None:
    """Train what is trainable, and leave two checkpoints in `out`."""
    arguments = TrainingArguments(
        output_dir=str(out), max_steps=steps, save_steps=steps // 2, warmup_steps=steps // 8, learning_rate=3e-3,
        per_device_train_batch_size=8, logging_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True, seed=0,
        dataloader_pin_memory=False,
    )  # fmt: skip
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    trainer = Trainer(model, arguments, train_dataset=samples(tokenizer, corpus), data_collator=collator)
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def loss(model: torch.nn.Module, batch: torch.Tensor) -> float:
    with torch.no_grad():
        return float(model(input_ids=batch, labels=batch).loss)


def main(steps: int) -> None:
    def run(*words: str) -> None:
        print(f"\n$ loratool {' '.join(words)}", flush=True)
        subprocess.run([sys.executable, "-m", "loratool", *words], check=True)

    set_seed(0)
    code = CODE + FAMILIES
    tokenizer = tokenizer_for(code)
    sizes = {"vocab_size": len(tokenizer), "n_positions": 128, "n_embd": 128, "n_layer": 2, "n_head": 4}
    sizes |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    base = GPT2LMHeadModel(GPT2Config(**sizes, pad_token_id=0))
    train(base, tokenizer, code, Path("pretraining"), steps)
    base.save_pretrained("base")
    tokenizer.save_pretrained("base")
    batch = torch.tensor([sample["input_ids"] for sample in samples(tokenizer, FAMILIES)[-16:]])
    before = loss(base.eval(), batch)

    # PEFT notes in the adapter where its base is; fan_in_fan_out: the weights of GPT-2's Conv1D layers are (in, out)
    base = GPT2LMHeadModel.from_pretrained("base")
    targets = {"target_modules": ["c_attn"], "fan_in_fan_out": True, "task_type": "CAUSAL_LM"}
    live = get_peft_model(base, LoraConfig(r=8, lora_alpha=32, lora_dropout=0.1, bias="none", **targets))
    train(live, tokenizer, FAMILIES, Path("out"), steps)
    after = loss(live.eval(), batch)
    left = sorted((p.name for p in Path("out").iterdir()), key=lambda name: int(name.partition("-")[2]))
    print(f"loss on families: {before:.2f} by the base, {after:.2f} with the LoRA")
    print(f"the Trainer left {' and '.join(left)}")
    assert after < before, "the adapter learnt nothing"

    run("inspect", f"out/{left[-1]}")
    run("resize", f"out/{left[-1]}", "-o", "small", "--energy", "0.95")
    lost = loratool.compare(f"out/{left[-1]}", "small").totals["distance"] ** 2
    print(f"\nenergy that the smaller adapter lacks: {lost:.1%}")
    assert lost < 0.0501

    run("merge", f"out/{left[-1]}", "-o", "merged")  # into the base that the adapter names
    merged = GPT2LMHeadModel.from_pretrained("merged").eval()
    with torch.no_grad():
        furthest = float((merged(batch).logits - live(input_ids=batch).logits).abs().max())
    print(f"\nlargest difference of logits, merged model to PEFT's: {furthest:.0e}")
    assert furthest < 1e-3
    prompt = tokenizer("    layers=(\n        Linear(", return_tensors="pt")
    wanted, written = (m.generate(**prompt, max_new_tokens=24, do_sample=False)[0] for m in (live, merged))
    assert wanted.equal(written), "the merged model writes something else"
    print(f"both write {tokenizer.decode(written)!r}")


if __name__ == "__main__":
    logging.disable_progress_bar()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, help="keep the files in this new folder")
    parser.add_argument("--tiny", action="store_true", help="fewer steps, for tests")
    given = parser.parse_args()
    if given.out and given.out.exists():
        parser.error(f"{given.out} exists: -o makes a new folder")
    with tempfile.TemporaryDirectory() as temporary:
        out = given.out or Path(temporary, "out")
        out.mkdir(parents=True)
        with contextlib.chdir(out):
            main(40 if given.tiny else 200)
