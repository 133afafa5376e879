"""compare: numbers against dense fp64 matrices, verdicts of updates that are made to fight, to help or to pass by."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_files import HIDDEN, INNER, KV, SHAPES, factors, run_main, write_adapter, write_json

import loratool
from loratool.adapter import Adapter, Origin, Target
from loratool.deltas import Dora, Full, Glora, Ia3, LoHa, LowRank, OutputOft, Sparse
from loratool.engine import Resources, measure
from loratool.errors import LoratoolError
from loratool.operations import compare, pairs
from loratool.plugins import installed
from loratool.storage.load import as_bytes
from loratool.tensors import Inline, TensorRef

Q0, K1, DOWN1 = SHAPES


def updates(tensors, scaling=2.0):
    """scaling * B @ A in fp64, by module."""
    found = {}
    for name, down in tensors.items():
        if ".lora_A." in name:
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            found[module] = scaling * tensors[name.replace("lora_A", "lora_B")].double() @ down.double()
    return found


def flat(deltas, modules=SHAPES):
    return torch.cat(
        [deltas[m].flatten() if m in deltas else torch.zeros(SHAPES[m]).double().flatten() for m in modules]
    )


def cosine(a, b):
    return float(a @ b / a.norm() / b.norm())


def unit(size, *places):
    """Columns of the identity, (size, len(places))."""
    return torch.eye(size)[:, list(places)]


def adapter(folder, up, down, **config):
    """An adapter of one module, down_proj, whose scaling is 1."""
    name = f"base_model.model.{DOWN1}.lora_"
    rank = up.shape[1]
    return write_adapter(
        folder,
        {f"{name}A.weight": down.contiguous(), f"{name}B.weight": up.contiguous()},
        r=rank,
        lora_alpha=rank,
        **config,
    )


# ------------------------------------------------------------------------------------------------------------- numbers


def test_two_adapters_by_module_and_in_total(tmp_path):
    one, two = factors(1, rank=4), factors(2, rank=3, shapes={Q0: SHAPES[Q0], DOWN1: SHAPES[DOWN1]})
    write_adapter(tmp_path / "a", one)
    write_adapter(tmp_path / "b", two, r=3, lora_alpha=6)
    report = loratool.compare(tmp_path / "a", tmp_path / "b")
    first, second = updates(one), updates(two)
    for row in report.rows:
        A, B = (d.get(row["module"], torch.zeros(SHAPES[row["module"]]).double()) for d in (first, second))
        assert row["norms"] == pytest.approx([float(A.norm()), float(B.norm())], rel=1e-12)
        assert row["distance"] == pytest.approx(float((A - B).norm() / max(A.norm(), B.norm())), rel=1e-12)
        if row["module"] == K1:
            assert row["cosine"] is row["overlap"] is None
            assert row["verdict"] == "one-sided"
            assert row["ranks"] == [4, 0]
            continue
        assert row["cosine"] == pytest.approx(cosine(A.flatten(), B.flatten()), abs=1e-13)
        onto = [(M @ torch.linalg.pinv(M), torch.linalg.pinv(M) @ M) for M in (A, B)]
        shares = [float((P @ M @ Q).norm() ** 2 / M.norm() ** 2) for (P, Q), M in zip(onto[::-1], (A, B), strict=True)]
        assert row["shares"] == pytest.approx(shares, rel=1e-9)
        assert row["overlap"] == pytest.approx(min(shares), rel=1e-9)
        assert len(row["column_angles"]) == len(row["row_angles"]) == 3
    A, B = flat(first), flat(second)
    assert report.totals["common"] == 2
    assert report.totals["modules"] == 3
    assert report.totals["norms"] == pytest.approx([float(A.norm()), float(B.norm())])
    assert report.totals["distance"] == pytest.approx(float((A - B).norm() / max(A.norm(), B.norm())), rel=1e-12)
    assert report.totals["cosine"] == pytest.approx(cosine(A, B), abs=1e-13)
    assert abs(report.totals["cosine"]) <= report.totals["overlap"] ** 0.5
    assert not report.totals["equal"]


def test_several_adapters_make_matrices_of_what_pairs_say(tmp_path):
    every = [factors(seed, rank=seed) for seed in (2, 3, 4)]
    for n, tensors in enumerate(every):
        write_adapter(tmp_path / f"a{n}", tensors, r=n + 2, lora_alpha=2 * (n + 2))
    paths = [tmp_path / f"a{n}" for n in range(3)]
    report = loratool.compare(*paths)
    vectors = [flat(updates(t)) for t in every]
    for i, one in enumerate(vectors):
        for j, two in enumerate(vectors):
            assert report.totals["cosines"][i][j] == pytest.approx(cosine(one, two), abs=1e-13)
            distance = float((one - two).norm() / max(one.norm(), two.norm()))
            assert report.totals["distances"][i][j] == pytest.approx(distance, abs=1e-13)
            if i < j:
                alone = loratool.compare(paths[i], paths[j])
                assert report.totals["overlaps"][i][j] == alone.totals["overlap"]
                pair = next(p for p in report.totals["pairs"] if p["adapters"] == [i + 1, j + 1])
                assert pair["verdict"] == alone.totals["verdict"]
    assert report.sources == {f"adapter {n + 1}": str(path) for n, path in enumerate(paths)}
    assert [len(row["pairs"]) for row in report.rows] == [3, 3, 3]
    lowest = min(
        cosine(flat(updates(every[i]), [Q0]), flat(updates(every[j]), [Q0])) for i, j in ((0, 1), (0, 2), (1, 2))
    )
    assert report.rows[0]["lowest_cosine"] == pytest.approx(lowest, abs=1e-13)


def test_the_order_of_adapters_changes_no_number(tmp_path):
    write_adapter(tmp_path / "a", factors(1))
    write_adapter(tmp_path / "b", factors(2))
    there, back = loratool.compare(tmp_path / "a", tmp_path / "b"), loratool.compare(tmp_path / "b", tmp_path / "a")
    for name in ("distance", "cosine", "overlap"):
        assert there.totals[name] == pytest.approx(back.totals[name], rel=1e-12)
    assert there.totals["norms"] == pytest.approx(back.totals["norms"][::-1], rel=1e-14)


def test_any_number_of_workers_gives_the_same_bits(tmp_path):
    for seed in (1, 2, 3):
        write_adapter(tmp_path / str(seed), factors(seed))
    reports = [
        loratool.compare(*(tmp_path / str(s) for s in (1, 2, 3)), resources=Resources("cpu", workers)).as_dict()
        for workers in (1, 2, 5)
    ]
    assert reports[0] == reports[1] == reports[2]


def test_without_small_factors_blocks_give_the_same_numbers(tmp_path, monkeypatch):
    """Large ranks are compared block by block: the same, less the subspaces, and that is said."""
    write_adapter(tmp_path / "a", factors(1))
    write_adapter(tmp_path / "b", factors(2))
    by_factors = loratool.compare(tmp_path / "a", tmp_path / "b")
    monkeypatch.setattr(pairs, "_ALWAYS", 0)
    monkeypatch.setattr(pairs, "_BLOCK", 5 * HIDDEN)
    by_blocks = loratool.compare(tmp_path / "a", tmp_path / "b")
    for name in ("distance", "cosine"):
        assert by_blocks.totals[name] == pytest.approx(by_factors.totals[name], rel=1e-12)
    assert by_blocks.totals["overlap"] is None
    assert [f.what for f in by_blocks.findings if f.where == "overlap"] == [
        f"has no small factors: its subspaces are not compared, and the overlap leaves it out (3 modules, such as {Q0})"
    ]
    assert loratool.compare(tmp_path / "a", tmp_path / "a").totals["equal"]


# --------------------------------------------------------------------------------------------------------------- equal


def test_a_resized_or_respelled_adapter_is_equal_only_if_it_is(tmp_path):
    write_adapter(tmp_path / "a", factors(1))
    loratool.resize(tmp_path / "a", tmp_path / "wide", rank=4, pad_rank=8)
    loratool.resize(tmp_path / "a", tmp_path / "small", rank=2)
    same = loratool.compare(tmp_path / "a", tmp_path / "a")
    assert same.totals["equal"]
    assert same.totals["distance"] == 0
    assert same.totals["summary"] == "the same update, bit for bit"
    rounded = loratool.compare(tmp_path / "a", tmp_path / "wide")
    assert not rounded.totals["equal"]  # its factors were rounded to fp32
    assert 0 < rounded.totals["distance"] < 1e-6
    assert [len(row["column_angles"]) for row in rounded.rows] == [4, 4, 4]  # what was padded is no direction
    small = loratool.compare(tmp_path / "a", tmp_path / "small")
    assert not small.totals["equal"]
    assert small.totals["verdict"] == "reinforcing"


def test_other_factors_of_one_update_are_equal(tmp_path):
    """Columns in another order, factors of two to and fro, a scaling folded in: nothing is rounded by that."""
    tensors = factors(1)
    write_adapter(tmp_path / "a", tensors)
    order = [2, 0, 3, 1]
    other = {n: t[order] * 4 if "lora_A" in n else t[:, order] / 2 for n, t in tensors.items()}
    write_adapter(tmp_path / "b", other, lora_alpha=4)
    report = loratool.compare(tmp_path / "a", tmp_path / "b")
    assert report.totals["equal"]
    assert report.totals["verdict"] == "equal"
    assert set(report.totals["verdicts"]) == {"equal"}
    assert "up to rounding" in report.totals["summary"] or report.totals["distance"] == 0


def test_a_module_whose_update_is_zero_may_as_well_be_missing(tmp_path):
    tensors = factors(1)
    write_adapter(tmp_path / "a", {n: t for n, t in tensors.items() if K1 not in n})
    write_adapter(tmp_path / "b", {n: 0 * t if K1 in n and "lora_B" in n else t for n, t in tensors.items()})
    report = loratool.compare(tmp_path / "a", tmp_path / "b")
    assert report.totals["equal"]
    assert report.totals["common"] == 2


def test_peft_and_kohya_spell_one_update(tmp_path):
    shapes = {f"bert.encoder.layer.{n}.attention.self.query": (16, 16) for n in range(2)}
    tensors = factors(1, shapes=shapes)
    write_adapter(tmp_path / "a", tensors)
    flat_names = {}
    for name, tensor in tensors.items():
        module, _, half = name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
        module = "lora_te_" + module.replace(".", "_")
        flat_names[f"{module}.{'lora_down' if half == 'lora_A' else 'lora_up'}.weight"] = tensor
        flat_names[f"{module}.alpha"] = torch.tensor(8.0)
    save_file(flat_names, tmp_path / "a.safetensors")
    assert loratool.compare(tmp_path / "a", tmp_path / "a.safetensors", arch="bert").totals["distance"] == 0


# ------------------------------------------------------------------------------------------------------------- verdicts


def test_the_opposite_update_fights(tmp_path):
    down, up = torch.randn(2, INNER), torch.randn(HIDDEN, 2)
    adapter(tmp_path / "a", up, down)
    adapter(tmp_path / "b", -up, down)
    totals = loratool.compare(tmp_path / "a", tmp_path / "b").totals
    assert totals["verdict"] == "opposed"
    assert totals["cosine"] == pytest.approx(-1)
    assert totals["overlap"] == pytest.approx(1)
    assert totals["summary"] == "they fight: added up they keep 0 % of their energy; opposed in 1 of 1 common modules"


@pytest.mark.parametrize(
    ("rows", "columns", "verdict", "overlap"),
    [
        ((0, 1), (0, 1), "equal", 1.0),
        ((0, 2), (0, 2), "reinforcing", 0.5),  # one of two directions in common: cosine 1/2
        ((1, 0), (0, 1), "mixed", 1.0),  # the same outputs and inputs, crosswise
        ((0, 1), (2, 3), "orthogonal", 0.0),  # the same outputs of other inputs
        ((2, 3), (0, 1), "orthogonal", 0.0),
    ],
)
def test_verdicts_of_known_subspaces(tmp_path, rows, columns, verdict, overlap):
    adapter(tmp_path / "a", unit(HIDDEN, 0, 1), unit(INNER, 0, 1).T)
    adapter(tmp_path / "b", unit(HIDDEN, *rows), unit(INNER, *columns).T)
    totals = loratool.compare(tmp_path / "a", tmp_path / "b").totals
    assert totals["verdict"] == verdict
    assert totals["overlap"] == pytest.approx(overlap, abs=1e-12)


def test_an_overlap_that_chance_explains_is_not_mixed(tmp_path):
    """Full-rank updates act everywhere."""
    generator = torch.Generator().manual_seed(0)
    for name in "ab":
        adapter(
            tmp_path / name, torch.randn(HIDDEN, 16, generator=generator), torch.randn(16, INNER, generator=generator)
        )
    totals = loratool.compare(tmp_path / "a", tmp_path / "b").totals
    assert totals["overlap"] > 0.3
    assert totals["verdict"] == "orthogonal"


def test_a_much_stronger_adapter_is_said_to_be(tmp_path):
    adapter(tmp_path / "a", unit(HIDDEN, 0), unit(INNER, 0).T)
    adapter(tmp_path / "b", 8 * unit(HIDDEN, 1), unit(INNER, 1).T)
    assert loratool.compare(tmp_path / "a", tmp_path / "b").totals["summary"] == (
        "they hardly meet: 0 % of the energy lies where both act; the second is 8 times as strong"
    )


def test_several_are_judged_pair_by_pair_in_one_line(tmp_path):
    up, down = unit(HIDDEN, 0), unit(INNER, 0).T
    for name, sign, place in (("a", 1, 0), ("b", -1, 0), ("c", 1, 3)):
        adapter(tmp_path / name, sign * up, unit(INNER, place).T if place else down)
    totals = loratool.compare(*(tmp_path / n for n in "abc")).totals
    assert totals["verdict"] == "opposed"
    assert totals["summary"] == "opposed: 1 and 2 (-1.00); orthogonal: 1 and 3, 2 and 3"


# ------------------------------------------------------------------------------------------------------- what it takes


def test_globs_need_not_match_in_every_adapter(tmp_path):
    write_adapter(tmp_path / "a", factors(1))
    write_adapter(tmp_path / "b", factors(2, shapes={Q0: SHAPES[Q0]}))
    report = loratool.compare(tmp_path / "a", tmp_path / "b", exclude="down_proj")
    assert [row["module"] for row in report.rows] == [Q0, K1]
    report = loratool.compare(tmp_path / "a", tmp_path / "b", target=["q_proj"])
    assert [row["module"] for row in report.rows] == [Q0]
    assert report.ledger[str(tmp_path / "a")] == {"computed": 2, "skipped": 4}
    for wrong in ("nonsense", "k_proj"):  # in no adapter; not in the second, of which nothing is left
        with pytest.raises(LoratoolError, match="no module"):
            loratool.compare(tmp_path / "a", tmp_path / "b", target=wrong)


def test_a_single_adapter_is_no_comparison(tmp_path, capsys):
    write_adapter(tmp_path / "a", factors(1))
    assert run_main("compare", tmp_path / "a") == 2
    assert "two adapters or more" in capsys.readouterr().err


def test_adapters_of_other_modules_other_shapes_and_replicated_layers_are_refused(tmp_path):
    write_adapter(tmp_path / "a", factors(1, shapes={Q0: SHAPES[Q0]}))
    write_adapter(tmp_path / "b", factors(1, shapes={K1: SHAPES[K1]}))
    write_adapter(tmp_path / "c", factors(1, shapes={Q0: (KV, HIDDEN)}))
    write_adapter(tmp_path / "d", factors(1, shapes={Q0: SHAPES[Q0]}), layer_replication=[[0, 2], [1, 2]])
    for other, says in (("b", "no module in common"), ("c", "has shape"), ("d", "layer_replication")):
        with pytest.raises(LoratoolError, match=says) as caught:
            loratool.compare(tmp_path / "a", tmp_path / other)
        assert caught.value.exit_code == 3


def test_other_bases_are_warned_of(tmp_path):
    for name, base in (("a", "org/one"), ("b", "/models/one"), ("c", "two")):
        write_adapter(tmp_path / name, factors(1), base_model_name_or_path=base)
    assert not loratool.compare(tmp_path / "a", tmp_path / "b").findings
    (finding,) = loratool.compare(tmp_path / "a", tmp_path / "c").findings
    assert finding.level == "warning"
    assert "org/one" in finding.what
    assert "two" in finding.what


def test_json_and_table_show_both_the_pair_and_the_matrix(tmp_path, capsys):
    for seed in (1, 2, 3):
        write_adapter(tmp_path / f"a{seed}", factors(seed))
    paths = [tmp_path / f"a{seed}" for seed in (1, 2, 3)]
    assert run_main("compare", *paths[:2], "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert {"modules", "common", "norms", "distance", "cosine", "equal", "overlap", "verdict"} <= report[
        "totals"
    ].keys()
    row = report["rows"][0]
    assert {"module", "ranks", "norms", "distance", "cosine", "column_angles", "row_angles", "equal"} <= row.keys()
    assert report["sources"] == {"first": str(paths[0]), "second": str(paths[1])}
    assert run_main("compare", *paths) == 0
    shown = capsys.readouterr().out
    for word in ("cosines", "overlaps", "distances", "1 a1", "3 a3", "lowest cosine", "summary"):
        assert word in shown
    assert "angles" not in shown


def test_an_open_fused_weight_is_cut_where_scalings_differ(tmp_path):
    """q, k and v with scalings of their own have no common factors; they are compared part by part all the same."""
    attention = "model.layers.0.self_attn"
    ups = [torch.randn(32, 3, generator=torch.Generator().manual_seed(n)) for n in range(3)]
    down = torch.randn(3, 32, generator=torch.Generator().manual_seed(9))
    prefix = "base_model.model."
    fused = {
        f"{prefix}{attention}.W_pack.lora_A.weight": down,
        f"{prefix}{attention}.W_pack.lora_B.weight": torch.cat(ups),
    }
    write_adapter(tmp_path / "fused", fused, r=3, lora_alpha=3)
    split = {}
    for n, (name, up) in enumerate(zip("qkv", ups, strict=True)):
        split[f"{prefix}{attention}.{name}_proj.lora_A.weight"] = down.clone()
        split[f"{prefix}{attention}.{name}_proj.lora_B.weight"] = up / 2**n
    write_adapter(tmp_path / "split", split, r=3, lora_alpha=3, alpha_pattern={"k_proj": 6, "v_proj": 12})
    report = loratool.compare(tmp_path / "fused", tmp_path / "split", arch="baichuan")
    assert report.totals["equal"]
    assert report.totals["common"] == 3


def test_the_hints_name_options_that_compare_has(tmp_path, capsys):
    write_adapter(tmp_path / "pissa", factors(1), init_lora_weights="pissa")
    write_adapter(tmp_path / "plain", factors(2))
    assert run_main("compare", tmp_path / "pissa", tmp_path / "plain") == 3
    hint = capsys.readouterr().err.partition("try:")[2]
    assert "--init-adapter" in hint
    write_adapter(tmp_path / "initial", factors(3))
    report = loratool.compare(tmp_path / "pissa", tmp_path / "plain", init_adapter=tmp_path / "initial")
    trained, begun, other = (flat(updates(factors(seed))) for seed in (1, 3, 2))
    assert report.totals["cosine"] == pytest.approx(cosine(trained - begun, other), abs=1e-12)
    assert report.rows[0]["ranks"] == [8, 4]


def test_not_finite_factors_are_named(tmp_path):
    tensors = factors(1)
    tensors[f"base_model.model.{Q0}.lora_A.weight"][0, 0] = float("nan")
    write_adapter(tmp_path / "a", tensors)
    write_adapter(tmp_path / "b", factors(2))
    with pytest.raises(LoratoolError, match=f"{Q0}.lora_A"):
        loratool.compare(tmp_path / "a", tmp_path / "b")


def test_a_config_beside_it_is_all_that_is_read_of_a_base(tmp_path: Path):
    write_adapter(tmp_path / "a", factors(1))
    (tmp_path / "base").mkdir()
    write_json(tmp_path / "base" / "config.json", {"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    assert loratool.compare(tmp_path / "a", tmp_path / "a", base=tmp_path / "base").totals["equal"]


# ---------------------------------------------------------------------------------- kinds that PEFT's files do not show


def ref(name, tensor, dtype="F64"):
    return TensorRef(name, tuple(tensor.shape), dtype, (Inline(bytes(as_bytes(tensor))),))


def compared(first, second, path="transformer.h.0.attn.c_attn", family="gpt2"):
    """The report on two adapters of one module."""
    adapters = [
        Adapter({Target("", (path,)): deltas}, Origin("peft", name)) for name, deltas in (("a", first), ("b", second))
    ]
    return measure(compare.plan(adapters, installed().architecture(family)), Resources("cpu", 1), None)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("block", [7, 1 << 20])
def test_a_dense_difference_meets_factors_in_the_orientation_of_the_stored_weight(block, monkeypatch):
    """GPT-2 stores (in, out): so is the difference; the factors are (out, in)."""
    monkeypatch.setattr(pairs, "_BLOCK", block)
    up, down, value = random(12, 2), random(2, 6, seed=1), random(6, 12, seed=2)
    lora = LowRank(ref("down", down), ref("up", up), 0.5)
    totals = compared((lora,), (Full(ref("value", value), 3.0),)).totals
    A, B = (0.5 * up @ down).flatten(), (3 * value.T).flatten()
    assert totals["cosine"] == pytest.approx(cosine(A, B), abs=1e-14)
    assert totals["distance"] == pytest.approx(float((A - B).norm() / max(A.norm(), B.norm())), rel=1e-13)
    same = compared((lora,), (Full(ref("value", (0.5 * up @ down).T.contiguous())),))
    assert same.totals["equal"]


def test_a_sparse_remainder_is_added_to_the_factors():
    up, down = random(8, 2), random(2, 6, seed=1)
    places, values = torch.tensor([[0, 7, 3], [5, 0, 2]]), random(3, seed=2)
    dense = 2 * up @ down
    dense[places[0], places[1]] += 2 * values
    size = ref("size", torch.tensor([8, 6]), "I64")
    sparse = Sparse(ref("indices", places, "I64"), ref("values", values), size, 2.0, (8, 6))
    lora = LowRank(ref("down", down), ref("up", up), 2.0)
    path = "model.layers.0.self_attn.q_proj"
    assert compared((lora, sparse), (Full(ref("value", dense)),), path, "llama").totals["equal"]
    alone = compared((lora, sparse), (lora,), path, "llama").totals
    assert alone["distance"] == pytest.approx(float(2 * values.norm() / dense.norm()))


def test_factors_are_the_same_whether_one_is_taken_off_or_not():
    """(IA)^3 of PEFT is the factor, that of LyCORIS the factor less one."""
    factors_ = 1 + 0.25 * torch.arange(6, dtype=torch.float64)
    peft, lycoris = Ia3(ref("ia3_l", factors_), True), Ia3(ref("weight", factors_ - 1), True, less_one=True)
    assert compared((peft,), (lycoris,)).totals["equal"]
    other = Ia3(ref("weight", 1 - factors_), True, less_one=True)
    assert compared((peft,), (other,)).totals["cosine"] == pytest.approx(-1)
    outputs = Ia3(ref("ia3_l", factors_), False)
    report = compared((peft,), (outputs,))
    assert report.rows[0]["verdict"] == "not compared"
    assert not report.totals["equal"]


def test_rotations_of_outputs_and_glora_are_compared_by_what_they_hold():
    blocks = random(3, 4, 4)
    oft = [OutputOft(ref("oft", b), alpha=0.1) for b in (blocks, -blocks, blocks.clone())]
    assert compared((oft[0],), (oft[1],)).totals["cosine"] == pytest.approx(-1)
    assert compared((oft[0],), (oft[2],)).totals["equal"]
    b = LowRank(ref("down", random(2, 6)), ref("up", random(12, 2, seed=1)), 0.5)
    a1, a2 = random(6, 2, seed=2), random(2, 6, seed=3)
    one, two = (Glora(ref("a1", a), ref("a2", a2), b) for a in (a1, 2 * a1))
    assert compared((one,), (one,)).totals["equal"]
    report = compared((one,), (two,))
    assert report.rows[0]["cosine"] == pytest.approx(1)
    assert report.rows[0]["glora a1_distance"] == pytest.approx(0.5)
    assert not report.totals["equal"]


def test_fused_and_split_are_one_update_for_loha_and_dora_too():
    """Rows of a product by entries are the products of rows; DoRA's norms are those of rows."""
    out, rank, into = 18, 2, 6
    w1_a, w2_a, magnitude = random(out, rank), random(out, rank, seed=1), random(out, seed=2)
    down, other = random(rank, into, seed=3), random(rank, into, seed=4)

    def loha(rows):
        return LoHa(ref("w1_a", w1_a[rows]), ref("w1_b", down), ref("w2_a", w2_a[rows]), ref("w2_b", other), 0.5)

    def dora(rows):
        return Dora(LowRank(ref("down", down), ref("up", w1_a[rows]), 0.5), ref("magnitude", magnitude[rows]))

    attention = "model.layers.0.self_attn.W_pack"
    for make in (loha, dora):
        whole = {Target("", (attention,)): (make(slice(None)),)}
        parts = {Target("", (f"{attention}[{q}]",)): (make(slice(6 * n, 6 * n + 6)),) for n, q in enumerate("qkv")}
        adapters = [Adapter(deltas, Origin("peft", name)) for deltas, name in ((whole, "a"), (parts, "b"))]
        plan = compare.plan(adapters, installed().architecture("baichuan"))
        report = measure(plan, Resources("cpu", 1), None)
        assert report.totals["equal"]
        assert [row["module"] for row in report.rows] == [f"{attention}[{q}]" for q in "kqv"]
