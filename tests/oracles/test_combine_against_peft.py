"""combine against PEFT's add_weighted_adapter, where both claim the same: sums, and its ties and dare."""

import hashlib

import peft
import pytest
import torch
from conftest import adapt, build
from safetensors.torch import load_file

import loratool
from loratool.errors import MismatchError

TARGETS = ["q_proj", "v_proj", "down_proj"]
WEIGHTS = [0.7, -0.4]


def saved(folder, seed, targets=TARGETS, layers=2, **config):
    live = adapt(build("llama", num_hidden_layers=layers), seed, target_modules=targets, **{"lora_alpha": 9, **config})
    live.save_pretrained(folder)
    return folder


@pytest.fixture
def two(tmp_path):
    return [saved(tmp_path / name, seed, r=4) for seed, name in enumerate(("one", "two"), start=1)]


def by_peft(folders, weights, kind, layers=2, **options):
    """{module: (A, B)} of the adapter that PEFT makes."""
    live = peft.PeftModel.from_pretrained(build("llama", num_hidden_layers=layers), folders[0], adapter_name="0")
    for n, folder in enumerate(folders[1:], start=1):
        live.load_adapter(folder, str(n))
    names = [str(n) for n in range(len(folders))]
    with torch.no_grad():
        live.add_weighted_adapter(names, weights, "new", combination_type=kind, **options)
    found = {n: m for n, m in live.base_model.model.named_modules() if hasattr(m, "lora_A")}
    return {n: (m.lora_A["new"].weight.detach(), m.lora_B["new"].weight.detach()) for n, m in found.items()}


def by_us(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    names = [n.removesuffix(".lora_A.weight") for n in tensors if n.endswith("lora_A.weight")]
    return {
        n.removeprefix("base_model.model."): (tensors[f"{n}.lora_A.weight"], tensors[f"{n}.lora_B.weight"])
        for n in names
    }


def assert_same_updates(ours, theirs, tolerance=1e-5):
    assert ours.keys() == theirs.keys()
    for name, (A, B) in theirs.items():
        wanted = B.double() @ A.double()
        got = ours[name][1].double() @ ours[name][0].double()
        assert float((got - wanted).norm()) <= tolerance * float(wanted.norm()), name


@pytest.mark.parametrize(("kind", "options"), [("cat", {}), ("svd", {"svd_rank": 5})])
def test_a_sum_is_that_of_peft(two, tmp_path, kind, options):
    rank = {"rank": options["svd_rank"]} if options else {}
    loratool.combine(two, tmp_path / "both", weights=WEIGHTS, method=kind, **rank)
    assert_same_updates(by_us(tmp_path / "both"), by_peft(two, WEIGHTS, kind, **options))


def test_peft_loads_what_is_combined_and_answers_with_the_sum(tmp_path, run_model):
    """rsLoRA and patterns, which PEFT's own combination gets wrong: two active adapters are the oracle."""
    one = saved(tmp_path / "one", 1, r=4, use_rslora=True)
    two = saved(tmp_path / "two", 2, ["q_proj", "o_proj"], r=6, rank_pattern={"q_proj": 3}, alpha_pattern={"o_proj": 5})
    live = peft.PeftModel.from_pretrained(build("llama"), one, adapter_name="one")
    live.load_adapter(two, "two")
    live.base_model.set_adapter(["one", "two"])
    for module in live.modules():
        if hasattr(module, "scale_layer"):
            for name, weight in (("one", 0.7), ("two", 0.4)):
                if name in module.scaling:
                    module.scaling[name] *= weight
    wanted = run_model("llama", live)
    loratool.combine([one, two], tmp_path / "both", weights=[0.7, 0.4])
    ours = peft.PeftModel.from_pretrained(build("llama"), tmp_path / "both").eval()
    effect = float((wanted - run_model("llama", build("llama"))).abs().max())
    assert float((run_model("llama", ours) - wanted).abs().max()) < 1e-5 * max(effect, 1)


@pytest.mark.parametrize("sign", ["total", "frequency"])
def test_ties_is_pefts_in_both_factors(two, tmp_path, sign):
    loratool.combine(two, tmp_path / "both", weights=WEIGHTS, method="ties", options={"density": 0.5, "sign": sign})
    theirs = by_peft(two, WEIGHTS, "ties", density=0.5, majority_sign_method=sign)
    ours = by_us(tmp_path / "both")
    assert ours.keys() == theirs.keys()
    for name, (A, B) in theirs.items():
        torch.testing.assert_close(ours[name], (A, B), rtol=1e-5, atol=1e-7)


def test_the_factorwise_sum_is_pefts_linear(two, tmp_path):
    loratool.combine(two, tmp_path / "both", weights=WEIGHTS, method="peft_linear_factors")
    theirs = by_peft(two, WEIGHTS, "linear")
    for name, factors in by_us(tmp_path / "both").items():
        torch.testing.assert_close(factors, theirs[name], rtol=1e-5, atol=1e-7)


def in_order_of_bytes(folders):
    """combine takes adapters in the order of the SHA-256 of their A in a module: the first mask is the first one's."""

    def digest(folder):
        (A,) = (t for n, t in load_file(folder / "adapter_model.safetensors").items() if "lora_A" in n)
        return hashlib.sha256(A.numpy().tobytes()).digest()

    return sorted(folders, key=digest)


@pytest.mark.parametrize("kind", ["dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd"])
def test_dare_is_pefts_with_the_same_seed(tmp_path, kind):
    folders = [saved(tmp_path / name, seed, ["v_proj"], 1, r=4) for seed, name in enumerate(("one", "two"), start=1)]
    folders = in_order_of_bytes(folders)
    module = "model.layers.0.self_attn.v_proj"
    rank = {"rank": 8} if kind.endswith("svd") else {}
    options = {"density": 0.5, "seed": 11}
    loratool.combine(folders, tmp_path / "both", weights=WEIGHTS, method=kind, options=options, **rank)
    more = {"svd_rank": 8} if rank else {}
    theirs = by_peft_seeded(folders, kind, more, module)
    if rank:
        assert_same_updates(by_us(tmp_path / "both"), theirs, 1e-4)
    else:
        torch.testing.assert_close(by_us(tmp_path / "both")[module], theirs[module], rtol=1e-5, atol=1e-7)


def by_peft_seeded(folders, kind, more, module):
    """PEFT's combination; building model and adapter uses random numbers too, so the seed is set just before."""
    seed = int.from_bytes(hashlib.sha256(f"11:{module}".encode()).digest()[:7], "big")
    whose = peft.tuners.lora.model.LoraModel
    name = (
        "_svd_generalized_task_arithmetic_weighted_adapter" if more else "_generalized_task_arithmetic_weighted_adapter"
    )
    original = getattr(whose, name)

    def seeded(*arguments, **options):
        torch.manual_seed(seed)
        return original(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(whose, name, seeded)
        return by_peft(folders, WEIGHTS, kind, layers=1, density=0.5, **more)


def test_ties_of_the_deltas_is_pefts_ties_svd(two, tmp_path):
    loratool.combine(two, tmp_path / "both", weights=WEIGHTS, method="ties_svd", options={"density": 0.4}, rank=6)
    assert_same_updates(by_us(tmp_path / "both"), by_peft(two, WEIGHTS, "ties_svd", density=0.4, svd_rank=6), 1e-3)


def test_factors_of_different_ranks_are_refused(tmp_path):
    folders = [saved(tmp_path / str(r), r, r=r) for r in (2, 4)]
    for options in ({"dry_run": True}, {}):
        with pytest.raises(MismatchError, match="the ranks 2, 4 differ") as refusal:
            loratool.combine(folders, tmp_path / "both", method="ties", **options)
        assert refusal.value.where == "model.layers.0.mlp.down_proj"
    assert not (tmp_path / "both").exists()
