"""What PiSSA left of a base is known for that wherever it goes, and no wrong model comes of it.

The oracle is PEFT: the logits of the live model that it trained on the residual, and torch in fp64.
"""

import json
import shutil
import warnings
from pathlib import Path
from typing import NamedTuple

import peft
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_files import run_main, snapshot
from transformers import LlamaForCausalLM

import loratool
from loratool import Publishing
from loratool.errors import LoratoolError, MismatchError
from loratool.opening import open_adapter
from loratool.settings import Applied
from loratool.testing.hub import Hub

pytest_plugins = ["hub_fixtures"]
IDS = torch.arange(3, 21).reshape(2, 9)
CARD = "---\nlicense: llama3\nlicense_name: llama3\nbase_model: other/one\n---\n# Mine\n"


class Made(NamedTuple):
    """base: the original; rest: the residual; new: what init made; trained: what PEFT made of it, with its logits."""

    base: Path
    rest: Path
    new: Path
    trained: Path
    logits: torch.Tensor


def step(live):
    """Train until every factor has moved."""
    optimizer = torch.optim.SGD([p for p in live.parameters() if p.requires_grad], lr=0.5)
    for seed in range(3):
        ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(seed))
        live(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return live


def logits(folder, adapter=""):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        model = LlamaForCausalLM.from_pretrained(folder)
        model = peft.PeftModel.from_pretrained(model, adapter) if adapter else model
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def make(folder: Path, tiny, init: str = "pissa") -> Made:
    model = tiny("llama")
    model.config._name_or_path = "other/one"
    model.save_pretrained(folder / "base")
    config = json.loads((folder / "base/config.json").read_text())
    (folder / "base/config.json").write_text(json.dumps({**config, "_name_or_path": "other/one"}))
    (folder / "base/README.md").write_text(CARD)
    made = Made(*(folder / n for n in ("base", "rest", "new", "trained")), torch.empty(0))
    loratool.init(made.base, made.new, init=init, residual=made.rest, rank=4, alpha=6)
    rest = LlamaForCausalLM.from_pretrained(made.rest)
    live = step(peft.PeftModel.from_pretrained(rest, str(made.new), is_trainable=True))
    live.save_pretrained(made.trained)
    with torch.no_grad():
        return made._replace(logits=live.eval()(input_ids=IDS).logits)


@pytest.fixture
def made(tmp_path, tiny) -> Made:
    return make(tmp_path, tiny)


def is_trained(folder, made):
    torch.testing.assert_close(logits(folder), made.logits, rtol=1e-4, atol=1e-4)
    return True


def warned(report):
    return [f"{f.what} {f.hint}" for f in report.findings if f.level == "warning"]


# -- What may be merged into a residual -------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["pissa", "loftq"])
def test_a_start_is_not_taken_out_of_the_residual_twice(init, tiny, tmp_path):
    made = make(tmp_path, tiny, init)
    before = snapshot(tmp_path)
    with pytest.raises(MismatchError, match="taken out twice") as refusal:
        loratool.merge(made.rest, made.trained, tmp_path / "out", init_adapter=made.new / "initial")
    assert "is what it was trained on: leave --init-adapter out" in refusal.value.hint
    own = Applied(made.trained, init_adapter=made.new / "initial")
    with pytest.raises(MismatchError, match="taken out twice"):
        loratool.merge(made.rest, [own], tmp_path / "out")
    code = run_main("merge", made.rest, made.trained, "-o", tmp_path / "o", "--init-adapter", made.new / "initial")
    assert code == 3
    assert snapshot(tmp_path) == before
    report = loratool.merge(made.rest, made.trained, tmp_path / "out")
    assert not warned(report)
    assert is_trained(tmp_path / "out", made)


def test_an_adapter_of_the_original_base_is_not_merged_into_the_residual(made, tmp_path):
    loratool.convert(made.trained, tmp_path / "plain", to="peft", init_adapter=made.new / "initial")
    loratool.init(made.base, tmp_path / "kaiming")
    live = step(peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(made.base), str(tmp_path / "kaiming"),
                                               is_trainable=True))  # fmt: skip
    live.save_pretrained(tmp_path / "other")
    for adapter in ("plain", "other"):
        with pytest.raises(MismatchError, match=r"PiSSA residual of base: it lacks what new starts from") as refusal:
            loratool.merge(made.rest, tmp_path / adapter, tmp_path / "out")
        assert "merge it into base" in refusal.value.hint
    assert not (tmp_path / "out").exists()
    # beside one that brings the start back it is right: the sum of both updates
    loratool.merge(made.rest, [made.trained, tmp_path / "plain"], tmp_path / "both")
    loratool.merge(made.base, tmp_path / "plain", tmp_path / "twice", weights=[2.0])
    torch.testing.assert_close(logits(tmp_path / "both"), logits(tmp_path / "twice"), rtol=1e-3, atol=1e-4)


def test_a_single_file_says_in_its_header_that_it_is_a_residual(tiny, tmp_path):
    tiny("llama").save_pretrained(tmp_path / "base")
    base = tmp_path / "base/model.safetensors"
    loratool.init(base, tmp_path / "new", init="pissa", residual=tmp_path / "rest.safetensors", arch="llama")
    rest = tmp_path / "elsewhere/moved.safetensors"
    rest.parent.mkdir()
    shutil.move(tmp_path / "rest.safetensors", rest)
    loratool.init(tmp_path / "base", tmp_path / "kaiming")
    with pytest.raises(MismatchError, match="PiSSA residual of model"):
        loratool.merge(rest, tmp_path / "kaiming", tmp_path / "out.safetensors", arch="llama")
    loratool.merge(rest, tmp_path / "new", tmp_path / "out.safetensors", arch="llama")
    with safe_open(tmp_path / "out.safetensors", "pt") as merged, safe_open(base, "pt") as original:
        assert merged.metadata() == original.metadata()
        for name in original.keys():  # noqa: SIM118
            torch.testing.assert_close(merged.get_tensor(name), original.get_tensor(name), rtol=1e-5, atol=1e-6)
    assert not warned(loratool.init(tmp_path / "out.safetensors", tmp_path / "again", arch="llama"))


def test_what_names_neither_is_warned_of(made, tmp_path):
    config = json.loads((made.trained / "adapter_config.json").read_text())
    for named in ("/gone/elsewhere", None):
        told = {**config, "base_model_name_or_path": named}
        (made.trained / "adapter_config.json").write_text(json.dumps(told))
        report = loratool.merge(made.rest, made.trained, tmp_path / "out", force=True)
        assert any("PiSSA residual of base" in text and str(named or "no base") in text for text in warned(report))
    assert is_trained(tmp_path / "out", made)


def test_a_moved_residual_is_still_one_and_its_merged_model_is_none(made, tmp_path):
    (tmp_path / "moved").mkdir()
    made.rest.rename(tmp_path / "moved/rest")
    (tmp_path / "moved/rest/loratool.report.json").unlink()
    report = loratool.merge(tmp_path / "moved/rest", made.trained, tmp_path / "out")
    assert not warned(report)
    assert is_trained(tmp_path / "out", made)
    assert not (tmp_path / "out/loratool_residual.json").exists()
    report = loratool.merge(made.base, made.trained, tmp_path / "wrong")  # nothing here says that it began elsewhere
    assert any(str(made.rest) in text and str(made.base) in text and "PiSSA" in text for text in warned(report))
    loratool.init(made.base, tmp_path / "kaiming", init="gaussian")
    assert not warned(loratool.init(tmp_path / "out", tmp_path / "k2"))
    assert any("PiSSA residual" in text for text in warned(loratool.init(tmp_path / "moved/rest", tmp_path / "k3")))


def test_weights_on_a_residual_scale_the_start_too(made, tmp_path):
    half = loratool.merge(made.rest, made.trained, tmp_path / "half", weights=[0.5])
    (text,) = warned(half)
    assert "a weight other than 1" in text
    assert f"loratool merge base {made.trained}:0.5 --init-adapter new/initial" in text
    for more in ({"scales": {"q_proj": 0.5}}, {"exclude": "q_proj"}):
        (text,) = warned(loratool.merge(made.rest, made.trained, tmp_path / "out", force=True, **more))
        assert "start" in text
    loratool.merge(made.base, made.trained, tmp_path / "learnt", weights=[0.5], init_adapter=made.new / "initial")
    # fp64: base + 0.5 (trained - start), and rest + 0.5 trained is something else
    base, rest = (load_file(folder / "model.safetensors") for folder in (made.base, made.rest))
    factors, began = (load_file(f / "adapter_model.safetensors") for f in (made.trained, made.new / "initial"))
    name = "model.layers.0.self_attn.q_proj.weight"
    key = f"base_model.model.{name.removesuffix('weight')}lora_"
    one, other = (1.5 * f[f"{key}B.weight"].double() @ f[f"{key}A.weight"].double() for f in (factors, began))
    for folder, wanted in (("learnt", base[name] + 0.5 * (one - other)), ("half", rest[name] + 0.5 * one)):
        found = load_file(tmp_path / folder / "model.safetensors")[name].double()
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_several_that_began_there_bring_the_start_back_once(made, tmp_path):
    shutil.copytree(made.trained, tmp_path / "second")
    with pytest.raises(MismatchError, match="would count 2 times"):
        loratool.merge(made.rest, [made.trained, tmp_path / "second"], tmp_path / "out")
    report = loratool.merge(made.rest, [made.trained, tmp_path / "second"], tmp_path / "out", weights=[0.5, 0.5])
    assert not warned(report)
    assert is_trained(tmp_path / "out", made)


def test_both_ways_are_named_and_inspect_knows_the_residual(made, tmp_path):
    with pytest.raises(MismatchError) as refusal:
        loratool.merge(made.base, made.trained, tmp_path / "out")
    assert f"merge it into {made.rest}" in refusal.value.hint
    assert "--init-adapter" in refusal.value.hint
    opened = open_adapter(made.trained)
    assert opened.residual == str(made.rest)
    with pytest.raises(MismatchError):
        loratool.merge(made.base, opened, tmp_path / "out")
    loratool.merge(made.rest, opened, tmp_path / "out")
    assert is_trained(tmp_path / "out", made)
    for adapter in (made.trained, made.new):
        told = [f.what for f in loratool.inspect(adapter).findings]
        assert f"{made.rest} is the PiSSA residual of base: the adapter fits that base only" in told


def test_init_says_what_comes_next_and_which_option_is_in_the_way(made, tmp_path):
    report = loratool.init(made.base, tmp_path / "n", init="pissa", residual=tmp_path / "r")
    assert f"train on {tmp_path / 'r'}" in report.findings[-1].what
    assert str(tmp_path / "n/initial") in report.findings[-1].what
    for residual in (tmp_path / "r", made.base):
        with pytest.raises(LoratoolError) as refusal:
            loratool.init(made.base, tmp_path / "n2", init="pissa", residual=residual)
        assert "choose another --residual" in refusal.value.hint
        assert "-o" not in refusal.value.hint.split()


# -- Cards ------------------------------------------------------------------------------------------------------------


def test_the_card_says_that_it_is_a_residual_and_whose_licence_it_has(made, tmp_path):
    text = (made.rest / "README.md").read_text()
    fields = yaml.safe_load(text.split("---")[1])
    assert "# The PiSSA residual of base" in text
    assert "Merged" not in text
    assert "merged" not in fields["tags"]
    assert "base_model" not in fields
    assert (fields["license"], fields["license_name"]) == ("llama3", "llama3")
    assert str(tmp_path) not in text + (made.rest / "loratool_residual.json").read_text()


def test_the_base_of_a_card_is_what_was_given_and_not_what_that_came_from(made, tmp_path):
    loratool.init(made.base, tmp_path / "kaiming", init="gaussian")
    for named, wanted in ((str(made.base), None), ("org/base", "org/base")):
        path = tmp_path / "kaiming/adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": named}))
        loratool.merge(made.base, tmp_path / "kaiming", tmp_path / "out", allow_noop=True, force=True)
        fields = yaml.safe_load((tmp_path / "out/README.md").read_text().split("---")[1])
        assert fields.get("base_model") == wanted
        assert fields["license"] == "llama3"


# -- The Hub ----------------------------------------------------------------------------------------------------------


def test_on_the_hub_they_behave_as_here(hub: Hub, made, tmp_path):
    hub.create("me/original", made.base)
    report = loratool.push(made.trained, to="me/adapter", publish=Publishing(dry_run=True))
    (text,) = (t for t in warned(report) if "folder of this machine" in t)
    assert f"{made.rest} as its base, the PiSSA residual of base" in text
    assert "base_model_name_or_path" in text
    loratool.push(made.rest, to="me/residual")
    path = made.trained / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "me/residual"}))
    report = loratool.push(made.trained, to="me/adapter")
    assert not any("folder of this machine" in t for t in warned(report))
    shutil.rmtree(made.rest)
    with pytest.raises(MismatchError, match="pissa changed the base model") as refusal:
        loratool.merge("me/original", "me/adapter", tmp_path / "out")
    assert "merge it into me/residual" in refusal.value.hint
    with pytest.raises(MismatchError, match="pissa changed the base model"):
        loratool.convert("me/adapter", tmp_path / "out.safetensors", to="kohya")
    with pytest.raises(MismatchError, match="taken out twice"):
        loratool.merge("me/residual", "me/adapter", tmp_path / "out", init_adapter=made.new / "initial")
    loratool.convert("me/adapter", tmp_path / "plain", to="peft", init_adapter=made.new / "initial")
    with pytest.raises(MismatchError, match="the PiSSA residual of base"):
        loratool.merge("me/residual", tmp_path / "plain", tmp_path / "out")
    assert not warned(loratool.merge("me/residual", "me/adapter", tmp_path / "out"))
    assert is_trained(tmp_path / "out", made)
    loratool.merge("me/original", "me/adapter", tmp_path / "two", init_adapter=made.new / "initial")
    assert is_trained(tmp_path / "two", made)


# -- What may be done with copies, and with several -------------------------------------------------------------------


def test_a_copy_of_the_residual_is_the_residual(hub: Hub, made, tmp_path):
    """Copied, renamed, saved again with its mark, pushed, pulled: while the first one is still there, and later."""
    shutil.copytree(made.rest, tmp_path / "renamed")
    LlamaForCausalLM.from_pretrained(made.rest).save_pretrained(tmp_path / "saved")
    shutil.copy(made.rest / "loratool_residual.json", tmp_path / "saved")
    loratool.push(made.rest, to="me/rest")
    config = json.loads((made.trained / "adapter_config.json").read_text())
    shutil.copytree(made.trained, tmp_path / "of-hub")
    (tmp_path / "of-hub/adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "me/rest"}))
    loratool.push(tmp_path / "of-hub", to="me/trained")
    loratool.pull("me/rest", tmp_path / "pulled")
    pairs = [(tmp_path / "renamed", made.trained), (tmp_path / "saved", made.trained), ("me/rest", made.trained)]
    pairs += [(made.rest, "me/trained"), (tmp_path / "pulled", "me/trained"), ("me/rest", "me/trained")]
    for n, (rest, trained) in enumerate(pairs):
        assert not warned(loratool.merge(rest, [trained], tmp_path / f"out{n}")), (rest, trained)
        assert is_trained(tmp_path / f"out{n}", made)


def test_a_plain_adapter_of_another_model_of_the_same_name_is_refused(made, tmp_path):
    other = tmp_path / "elsewhere/rest"
    shutil.copytree(made.base, other)
    loratool.init(other, tmp_path / "plain", rank=4)
    with pytest.raises(MismatchError, match="lacks what new starts from"):
        loratool.merge(made.rest, [tmp_path / "plain"], tmp_path / "out")


def test_an_adapter_of_an_earlier_residual_of_the_same_name_is_warned_of(made, tmp_path):
    loratool.init(made.base, made.new, init="pissa", residual=made.rest, rank=8, force=True)
    assert any("earlier residual" in text for text in warned(loratool.merge(made.rest, made.trained, tmp_path / "out")))


def test_adapters_of_one_residual_are_compared_and_resized(made, tmp_path):
    report = loratool.compare(made.trained, made.new)
    assert report.totals["equal"] is False
    loratool.resize(made.trained, tmp_path / "same", rank=4)
    report = loratool.merge(made.rest, tmp_path / "same", tmp_path / "out")
    assert is_trained(tmp_path / "out", made)
    with pytest.raises(LoratoolError, match="before training"):
        loratool.merge(made.base, tmp_path / "same", tmp_path / "none")


def test_the_start_counts_once_in_combinations_and_by_module(made, tmp_path):
    shutil.copytree(made.trained, tmp_path / "two")
    both = [made.trained, tmp_path / "two"]
    with pytest.raises(MismatchError, match="count 2 times"):
        loratool.combine(both, tmp_path / "sum", base=made.rest)
    with pytest.raises(MismatchError, match=r"count 0\.5 times"):
        loratool.merge(made.rest, both, tmp_path / "out", weights=[0.5, 0.5], scales={"q_proj": 0.5})
    loratool.combine(both, tmp_path / "mean", base=made.rest, weights=[0.5, 0.5])
    loratool.merge(made.rest, tmp_path / "mean", tmp_path / "merged")
    assert is_trained(tmp_path / "merged", made)


def test_what_another_learnt_is_added_to_the_residual_with_its_adapter(made, tmp_path):
    own = Applied(made.trained, init_adapter=made.new / "initial")
    loratool.merge(made.rest, [made.trained, own], tmp_path / "out")
    name = "model.layers.0.self_attn.q_proj"
    W, R = (load_file(folder / "model.safetensors")[f"{name}.weight"].double() for folder in (made.base, made.rest))
    factors = load_file(made.trained / "adapter_model.safetensors")
    A, B = (factors[f"base_model.model.{name}.lora_{x}.weight"].double() for x in "AB")
    wanted = R + 1.5 * B @ A + (1.5 * B @ A - (W - R))
    found = load_file(tmp_path / "out/model.safetensors")[f"{name}.weight"].double()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_loftq_says_what_is_not_taken_over_where_the_residual_is_gone(tiny, tmp_path):
    made = make(tmp_path, tiny, "loftq")
    shutil.rmtree(made.rest)
    report = loratool.merge(made.base, made.trained, tmp_path / "out", init_adapter=made.new / "initial")
    assert any("quantised the base" in text for text in warned(report))


def test_a_damaged_mark_is_not_no_mark(made, tmp_path):
    (made.rest / "loratool_residual.json").write_text("{broken")
    with pytest.raises(LoratoolError, match="JSON"):
        loratool.merge(made.rest, made.trained, tmp_path / "out")


def test_an_old_residual_is_not_lost_with_the_new_adapter(made, tmp_path, monkeypatch):
    """Where the adapter cannot be published after its residual was: a residual stays, and that it is new is said."""
    from loratool.storage import target

    publish = target.publish

    def refuse(source: Path, out: Path, force: bool) -> None:
        if out == made.new:
            raise OSError(28, "No space left on device")
        publish(source, out, force)

    monkeypatch.setattr(target, "publish", refuse)
    with pytest.raises(LoratoolError) as caught:
        loratool.init(made.base, made.new, init="pissa", residual=made.rest, rank=8, force=True)
    assert "make both again" in caught.value.hint
    assert (made.rest / "model.safetensors").is_file()
    assert (made.new / "adapter_config.json").is_file()
