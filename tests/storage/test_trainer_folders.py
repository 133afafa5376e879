"""What trainers leave behind: the adapter or the model in it is a source, and nothing else of it is ever opened."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_files import factors, run_cli, run_main, tensors_of_llama, write_adapter, write_base, write_json

import loratool
from loratool.errors import InputError, StorageError, UnsupportedError
from loratool.storage.checkpoint import companions, is_adapter_folder, open_adapter, open_base

STATE = (
    "optimizer.pt",
    "optimizer.bin",
    "scheduler.pt",
    "scaler.pt",
    "rng_state.pth",
    "rng_state_0.pth",
    "random_states_0.pkl",
    "training_args.bin",
)


def leave_state(folder: Path) -> Path:
    """What transformers and accelerate save beside the weights to go on training; each would be a disaster to open."""
    for name in STATE:
        (folder / name).write_bytes(b"never opened")
    write_json(folder / "trainer_state.json", {"global_step": 500, "log_history": []})
    return folder


def write_run(
    folder: Path, steps: tuple[int, ...] = (1000, 500, 1500), write: Callable[[Path], Path] = write_adapter
) -> Path:
    for step in steps:
        leave_state(write(folder / f"checkpoint-{step}"))
    return folder


_listening: list[set[Path]] = []


def _listen(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _listening and isinstance(arguments[0], (str, Path)):
        _listening[-1].add(Path(arguments[0]))


sys.addaudithook(_listen)


@contextmanager
def opened_files() -> Iterator[set[Path]]:
    """The files that Python opens meanwhile."""
    _listening.append(set())
    try:
        yield _listening[-1]
    finally:
        _listening.pop()


# -- one checkpoint ----------------------------------------------------------------------------------------------------


def test_of_a_checkpoint_only_the_files_of_the_adapter_are_opened(tmp_path: Path) -> None:
    base, folder = write_base(tmp_path / "base"), leave_state(write_adapter(tmp_path / "run/checkpoint-500"))
    (folder / "global_step500").mkdir()
    (folder / "global_step500/mp_rank_00_model_states.pt").write_bytes(b"never opened")
    with opened_files() as seen:
        for allow in (False, True):
            loratool.inspect(folder, spectrum=True, allow_pickle=allow)
            loratool.merge(base, [folder], tmp_path / f"out{allow}", allow_pickle=allow)
    assert {p.name for p in seen if folder in p.parents} == {"adapter_config.json", "adapter_model.safetensors"}


def test_a_checkpoint_of_a_whole_model_is_a_base(tmp_path: Path) -> None:
    base = leave_state(write_base(tmp_path / "run/checkpoint-500"))
    (base / "latest").write_text("global_step500")
    (base / "zero_to_fp32.py").write_text("")
    (base / "tokenizer.json").write_text("{}")
    assert open_base(str(base)).notes == ()
    adapter = write_adapter(tmp_path / "adapter")
    with opened_files() as seen:
        loratool.merge(base, [adapter], tmp_path / "out", allow_pickle=True)
    read = {p.name for p in seen if base in p.parents}
    assert read == {"config.json", "model.safetensors", "tokenizer.json"}
    assert {p.name for p in (tmp_path / "out").iterdir()} - {"loratool.report.json", "README.md"} == read


def test_what_a_trainer_keeps_does_not_belong_to_a_model(tmp_path: Path) -> None:
    leave_state(tmp_path)
    for name in (
        "zero_to_fp32.py",
        "all_results.json",
        "train_results.json",
        "eval_results.json",
        "trainer_config.json",
    ):
        (tmp_path / name).write_text("{}")
    assert companions(str(tmp_path)) == ["trainer_config.json"]


@pytest.fixture(scope="module")
def real_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder as transformers' Trainer and PEFT write it: two steps of a tiny model on the CPU."""
    import warnings

    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    folder = tmp_path_factory.mktemp("real")
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = LlamaForCausalLM(config)
        model.save_pretrained(folder / "base")
        model.name_or_path = model.config._name_or_path = str(folder / "base")
        tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
        data = [{"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4]}] * 4
        arguments = TrainingArguments(
            output_dir=str(folder / "run"),
            max_steps=10,
            save_steps=5,
            per_device_train_batch_size=2,
            report_to=[],
            use_cpu=True,
            learning_rate=0.01,
            disable_tqdm=True,
        )
        Trainer(tuned, arguments, train_dataset=data).train()
    return folder


def test_the_folder_of_a_real_trainer_is_read(real_run: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    run = real_run / "run"
    assert {p.name for p in (run / "checkpoint-10").iterdir()} >= {"optimizer.pt", "scheduler.pt", "trainer_state.json"}
    with pytest.raises(InputError, match=r"(?s)2 checkpoints.*checkpoint-5 \(step 5\).*checkpoint-10 \(step 10\)"):
        open_adapter(str(run))
    loratool.merge(real_run / "base", [run / "checkpoint-10"], tmp_path / "out")
    base = LlamaForCausalLM.from_pretrained(real_run / "base")
    expected = PeftModel.from_pretrained(base, run / "checkpoint-10").merge_and_unload().state_dict()
    merged = load_file(tmp_path / "out/model.safetensors")
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=1e-5)


# -- a run -------------------------------------------------------------------------------------------------------------


def test_a_run_lists_its_checkpoints_in_the_order_of_their_steps(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    with pytest.raises(InputError, match="3 checkpoints and no weights of its own") as caught:
        open_adapter(str(run))
    assert caught.value.what.splitlines()[1:] == [
        "  checkpoint-500 (step 500)",
        "  checkpoint-1000 (step 1000)",
        "  checkpoint-1500 (step 1500)",
    ]
    assert caught.value.hint.endswith(f"loratool inspect {run / 'checkpoint-1500'}")


@pytest.mark.parametrize("verb", ["inspect", "merge", "merge as the only source", "resize", "convert", "compare"])
def test_every_verb_says_so_and_ends_with_3(tmp_path: Path, verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    run, base, out = write_run(tmp_path / "run"), write_base(tmp_path / "base"), ("-o", tmp_path / "out")
    arguments = {
        "inspect": (run,),
        "merge": (base, run, *out),
        "merge as the only source": (run, *out),
        "resize": (run, "--rank", 2, *out),
        "convert": (run, "--to", "kohya", "-o", tmp_path / "out.safetensors"),
        "compare": (write_adapter(tmp_path / "adapter"), run),
    }[verb]
    assert run_main(verb.split(maxsplit=1)[0], *arguments) == 3
    said = capsys.readouterr().err
    assert said.index("checkpoint-500 ") < said.index("checkpoint-1000 ") < said.index("checkpoint-1500 ")
    assert "loratool inspect" in said


def test_the_adapter_in_the_root_of_a_run_is_the_one(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    final = factors(seed=9)
    shutil.copytree(write_adapter(tmp_path / "final", final), run, dirs_exist_ok=True)
    assert is_adapter_folder(str(run))
    opened = open_adapter(str(run))
    assert {p.path for ref in opened.tensors.values() for p in ref.pieces} == {str(run / "adapter_model.safetensors")}  # type: ignore[union-attr]


def test_the_named_adapter_in_the_root_of_a_run_is_the_one(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    write_adapter(run / "style")
    opened = open_adapter(str(run))
    assert {Path(p.path).parent for ref in opened.tensors.values() for p in ref.pieces} == {run / "style"}  # type: ignore[union-attr]


def test_a_run_with_one_checkpoint_is_not_taken_for_it(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", (7,))
    with pytest.raises(InputError, match="one checkpoint"):
        open_adapter(str(run))


def test_a_long_run_names_the_last_checkpoints(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", tuple(range(100, 2100, 100)))
    with pytest.raises(InputError, match="20 checkpoints") as caught:
        open_adapter(str(run))
    lines = caught.value.what.splitlines()
    assert lines[1] == "  8 earlier ones"
    assert lines[-1] == "  checkpoint-2000 (step 2000)"


def test_epochs_and_adapters_in_named_subfolders_are_checkpoints_too(tmp_path: Path) -> None:
    for n in (0, 1, 10):
        write_adapter(tmp_path / f"run/epoch_{n}/default")
    with pytest.raises(InputError, match=r"(?s)epoch_0 \(epoch 0\).*epoch_1 .*epoch_10"):
        open_adapter(str(tmp_path / "run"))
    assert open_adapter(str(tmp_path / "run/epoch_10")).tensors.keys() == factors().keys()


def test_a_run_of_whole_models_lists_them_as_bases(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", (20, 100, 3), write_base)
    for opening in (open_base, open_adapter):
        with pytest.raises(InputError, match=r"(?s)checkpoint-3 .*checkpoint-20 .*checkpoint-100 "):
            opening(str(run))
    adapter = write_adapter(tmp_path / "adapter")
    assert run_main("merge", run, adapter, "-o", tmp_path / "out") == 3
    assert f"loratool merge {run / 'checkpoint-100'} ADAPTER -o OUT" in capsys.readouterr().err.replace("\n", "")
    shutil.copytree(write_base(tmp_path / "final"), run, dirs_exist_ok=True)
    assert open_base(str(run)).tensors.keys() == tensors_of_llama().keys()


def test_the_error_reads_well_in_a_terminal(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", (500, 1000))
    done = run_cli("inspect", run)
    assert done.returncode == 3
    assert done.stdout == ""
    assert "checkpoint-500 (step 500)\n" in done.stderr
    assert "checkpoint-1000 (step 1000)\n" in done.stderr


# -- pieces ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [".", "global_step500", "global_step500/mp_rank_00_model_states.pt"])
@pytest.mark.parametrize("opening", [open_base, open_adapter])
def test_partitions_of_deepspeed_are_refused_with_the_way_out(
    tmp_path: Path, place: str, opening: Callable[..., Any]
) -> None:
    folder = tmp_path / "checkpoint-500"
    (folder / "global_step500").mkdir(parents=True)
    leave_state(folder)
    for name in ("mp_rank_00_model_states.pt", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"):
        (folder / "global_step500" / name).write_bytes(b"never opened")
    (folder / "latest").write_text("global_step500")
    (folder / "zero_to_fp32.py").write_text("")
    with opened_files() as seen, pytest.raises(UnsupportedError, match="DeepSpeed") as caught:
        opening(str(folder / place), allow_pickle=True)
    assert caught.value.hint.startswith(f"python {folder / 'zero_to_fp32.py'} {folder} OUT")
    assert not any(folder in p.parents for p in seen)


def test_partitions_beside_an_adapter_are_left_alone(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "checkpoint-500")
    (folder / "global_step500").mkdir()
    assert open_adapter(str(folder)).tensors.keys() == factors().keys()


def test_shards_of_torch_distributed_are_refused_with_the_way_out(tmp_path: Path) -> None:
    import warnings

    import torch.distributed.checkpoint as dcp

    folder = tmp_path / "checkpoint-5" / "pytorch_model_fsdp_0"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"a": torch.zeros(3)}, checkpoint_id=folder, no_dist=True)
    (shard,) = folder.glob("*.distcp")
    for place in (folder.parent, folder, shard):
        for opening in (open_base, open_adapter):
            with pytest.raises(UnsupportedError, match=r"\.distcp") as caught:
                opening(str(place), allow_pickle=True)
            assert f"accelerate merge-weights {folder}" in caught.value.hint


def test_metas_own_layout_is_named(tmp_path: Path) -> None:
    (tmp_path / "consolidated.00.pth").write_bytes(b"never opened")
    write_json(tmp_path / "params.json", {})
    with pytest.raises(UnsupportedError, match="Meta's own layout"):
        open_base(str(tmp_path), allow_pickle=True)


def test_a_folder_of_state_alone_has_no_weights(tmp_path: Path) -> None:
    leave_state(tmp_path)
    for opening in (open_base, open_adapter):
        with pytest.raises(StorageError, match="no weights"):
            opening(str(tmp_path), allow_pickle=True)
