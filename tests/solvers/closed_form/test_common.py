"""Checks that every registered merge without statistics passes by being listed."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from mergesolve.pools import Pool, PoolError, operator
from mergesolve.pools.workers import Workers
from mergesolve.solvers import OptionError
from mergesolve.solvers.closed_form import MERGES, Part, describe_merge, make_merge, merge_weights, plan, write_merge
from safetensors import safe_open
from safetensors.torch import load_file, save_file

DTYPES = ["float32", "bfloat16", "float16"]


@pytest.fixture
def count(tables):
    """The number of experts that a method takes, of those that are asked for."""
    return lambda method, n: tables.experts.get(method, n)


@pytest.fixture
def opened(sampled, tmp_path, count):
    """Factory of pools of files: opened(method, kind, n, dtype, **options)."""

    def make(method, kind="normal", n=4, dtype="float32", **options):
        base, experts = sampled(kind, count(method, n), dtype)
        folder = tmp_path / f"{kind}-{dtype}"
        folder.mkdir(exist_ok=True)
        for name, state in {"base": base, **experts}.items():
            if not (folder / f"{name}.safetensors").exists():
                save_file(state, folder / f"{name}.safetensors")
        paths = {name: folder / f"{name}.safetensors" for name in experts}
        return Pool.open(base=folder / "base.safetensors", experts=paths, **options)

    return make


def test_every_method_has_a_reference(tables):
    free = {name for name, entry in MERGES.items() if not entry.needs}
    assert free - set(tables.references) == set()
    assert free - set(tables.cases) == set()


@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("kind", ["normal", "grid"])
def test_equals_the_reference(case, kind, n, oracle, tables, count):
    name, options = case
    n = count(name, n)
    options = restricted(options, n)
    pool, wanted = oracle(name, options, kind, n)
    tables.same(merge_weights(pool, make_merge({"name": name, **options})), wanted, tables.decomposing.get(name, 2e-6))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["normal", "grid"])
def test_equals_the_reference_in_half_precision(method, kind, dtype, oracle, tables, count):
    pool, wanted = oracle(method, {}, kind, count(method, 4), dtype)
    tables.same(merge_weights(pool, make_merge(method)), wanted, tables.decomposing.get(method, 2e-6))


def restricted(options, n):
    """Leave out weights of experts that the pool lacks, and indices beyond it."""
    found = dict(options)
    if found.get("weights"):
        found["weights"] = {name: value for name, value in found["weights"].items() if int(name[1:]) < n}
    if found.get("first"):
        found["first"] = min(found["first"], n - 1)
    return found


@pytest.mark.parametrize(
    ("backend", "piece", "threads"), [("streaming", 40, 2), ("resident", 40, 1), ("streaming", 1100, 1)]
)
def test_does_not_depend_on_pieces_threads_and_backend(
    method, backend, piece, threads, oracle, count, monkeypatch, tables
):
    """Bit for bit, but for methods that take sums over tensors, which are as good as float64 in any order."""
    n = count(method, 4)
    whole, _ = oracle(method, {}, "normal", n, backend="streaming")
    wanted = merge_weights(whole, make_merge(method))
    monkeypatch.setattr(operator, "PIECE", piece)
    monkeypatch.setattr(operator, "gram_limit", lambda limit, n: max(1, limit // 4))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        pool, _ = oracle(method, {}, "normal", n, backend=backend)
        found = merge_weights(pool, make_merge(method))
    finally:
        torch.set_num_threads(before)
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        within = tables.summing.get(method, 0)
        torch.testing.assert_close(found[name], value, rtol=within, atol=within, msg=name)


@pytest.mark.parametrize("kind", ["normal", "grid"])
def test_equivariant_to_the_order_of_the_pool(method, kind, sampled, count, tables):
    if method in tables.ordered:
        pytest.skip("the order of its experts means something")
    base, experts = sampled(kind, count(method, 4), "float32")
    one = merge_weights(Pool.from_state_dicts(base, experts), make_merge(method))
    other = merge_weights(Pool.from_state_dicts(base, dict(reversed(experts.items()))), make_merge(method))
    within = tables.decomposing.get(method, 2e-6)
    for name in one:
        torch.testing.assert_close(other[name], one[name], rtol=2e-6, atol=within, msg=name)


def test_experts_like_the_base_change_nothing(method, sampled, count, tables):
    """All task vectors 0 but for one entry: everything else stays the base, bit for bit, and nothing is NaN."""
    base, _ = sampled("normal", 1, "float32")
    experts = {f"e{i}": dict(base) for i in range(count(method, 3))}
    touched = base["b.weight"].clone()
    touched[3, 4] += 1.0
    experts["e0"]["b.weight"] = touched
    merged = merge_weights(Pool.from_state_dicts(base, experts), make_merge(method))
    assert list(merged) == ["b.weight"]
    assert bool(merged["b.weight"].isfinite().all())
    elsewhere = torch.ones(60, 50, dtype=torch.bool)
    elsewhere[3, 4] = False
    kept = merged["b.weight"][elsewhere]
    if method in tables.inexact:
        torch.testing.assert_close(kept, base["b.weight"][elsewhere], rtol=tables.inexact[method], atol=0)
    else:
        assert torch.equal(kept, base["b.weight"][elsewhere])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("folder", [False, True])
def test_the_file_holds_the_merged_weights(method, folder, dtype, opened, tmp_path):
    """What is written is what merge_weights returns, rounded to the type of the base; the rest is carried over."""
    pool = opened(method, dtype=dtype)
    merge = make_merge(method)
    paths = write_merge(pool, merge, tmp_path / ("out" if folder else "out.safetensors"), max_shard_size=7000)
    shards = [path for path in paths if path.suffix == ".safetensors"]
    found = {name: tensor for path in shards for name, tensor in load_file(path).items()}
    wanted = merge_weights(pool, merge)
    base = load_file(pool_base(tmp_path, dtype))
    assert set(found) == set(base)
    for name, tensor in found.items():
        assert torch.equal(tensor, wanted[name].to(base[name].dtype) if name in wanted else base[name]), name
    with safe_open(shards[0], "pt") as file:
        record = file.metadata()
    assert make_merge(json.loads(record["merge"])) == merge
    assert json.loads(record["experts"]) == list(pool.names)
    assert folder == (len(shards) > 1)


def pool_base(tmp_path, dtype):
    return tmp_path / f"normal-{dtype}" / "base.safetensors"


def test_options_survive_json(case):
    name, options = case
    merge = make_merge({"name": name, **options})
    record = describe_merge(merge)
    assert record["name"] == name
    assert {key: record[key] for key in options} == options
    assert make_merge(json.loads(json.dumps(record))) == merge
    assert make_merge(merge) is merge


def test_documented_and_frozen(method):
    merge = make_merge(method)
    assert type(merge).__doc__.strip().splitlines()[0].rstrip().endswith((".", ":", ","))
    assert merge.source
    assert MERGES[method].summary.endswith(".")
    with pytest.raises(dataclasses.FrozenInstanceError):
        merge.scale = 1


def test_unknown_names_and_options_name_the_nearest(method):
    with pytest.raises(OptionError, match=r"Unknown option .* 'scal_e'"):
        make_merge({"name": method, "scal_e": 1})
    with pytest.raises(OptionError, match=f"Did you mean '{method}'"):
        make_merge(method + "x")


NUMBERS = {
    "scale": [float("nan"), float("inf"), "a", None, True],
    "density": [-0.1, 0, 1.1, float("nan"), "all"],
    "seed": [-1, 1.5, "x"],
    "epsilon": [-0.1, 1.5],
    "top": [-0.1, 1.5],
    "alpha": [-0.1, float("nan"), "x"],
    "t": [-0.1, 1.1, float("nan"), "x"],
    "decay": [-0.1, 1.0],
    "tall": [-1, float("nan")],
    "multitask": [0, float("inf")],
    "common": [-0.1, 1.1],
    "parallel": [-0.1, 1.0],
    "agree": [0, 1.5],
    "every": [0, 1.5],
    "first": [-1, 0.5],
}
WORDS = [
    "trim",
    "merge",
    "rescale",
    "zero",
    "window",
    "start",
    "of",
    "average",
    "inner",
    "normalize",
    "metric",
    "over",
    "domain",
]


def test_bad_options_name_option_and_value(method):
    fields = {field.name for field in dataclasses.fields(make_merge(method))}
    for option in fields & set(NUMBERS):
        for value in NUMBERS[option]:
            with pytest.raises(OptionError) as error:
                make_merge({"name": method, option: value})
            assert f"'{option}'" in str(error.value)
            assert repr(value) in str(error.value) or str(value) in str(error.value)
    for option in fields & set(WORDS):
        with pytest.raises(OptionError, match=f"'{option}'.*'nonsense'"):
            make_merge({"name": method, option: "nonsense"})
    if "densities" in fields:
        for value in [0.5, {"e0": 0.0}, {"e0": 1.5}, {"e0": "half"}]:
            with pytest.raises(OptionError, match="'densities'"):
                make_merge({"name": method, "densities": value})
    if "weights" in fields:
        for value in [[1.0, 2.0], {"e0": "much"}, {"e0": float("nan")}]:
            with pytest.raises(OptionError, match="'weights'"):
                make_merge({"name": method, "weights": value})


def test_weights_of_experts_that_are_not_there(method, sampled, count):
    if "weights" not in {field.name for field in dataclasses.fields(make_merge(method))}:
        pytest.skip("it takes no weights")
    base, experts = sampled("normal", count(method, 4), "float32")
    with pytest.raises(OptionError, match=r"'e00'.*Did you mean 'e0'"):
        merge_weights(Pool.from_state_dicts(base, experts), make_merge({"name": method, "weights": {"e00": 1.0}}))


def test_other_numbers_of_experts_are_refused(method, sampled, count, tables, tmp_path):
    if method not in tables.experts:
        pytest.skip("it takes any number of experts")
    base, experts = sampled("normal", 5, "float32")
    pool = Pool.from_state_dicts(base, experts)
    with pytest.raises(OptionError, match=r"the pool has 5: e0, e1, e2, e3, e4"):
        write_merge(pool, make_merge(method), tmp_path / "out.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def workers(monkeypatch):
    """All workers that are made: each pool that is derived from another one has its own, and counts what they read."""
    made = []
    original = Workers.__init__

    def init(self, *arguments, **options):
        original(self, *arguments, **options)
        made.append(self)

    monkeypatch.setattr(Workers, "__init__", init)
    return made


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_reads_and_writes_what_was_planned(case, dtype, opened, tmp_path, count, workers):
    name, options = case
    n = count(name, 4)
    merge = make_merge({"name": name, **restricted(options, n)})
    planned = plan(opened(name, dtype=dtype), merge)
    pool = opened(name, dtype=dtype, backend="streaming")
    assert pool.fingerprint  # reads samples, which are all that there is of tensors so small
    assert len(pool.tensors) > 5  # compares the models up to the first difference
    before = sum(each.bytes_read for each in workers)
    paths = write_merge(pool, merge, tmp_path / "out.safetensors")
    read = sum(each.bytes_read for each in workers) - before
    assert planned.experts == n
    assert read <= planned.bytes_read
    if not options:  # with weights of 0 experts are left out
        assert planned.bytes_read <= 2 * read
    content = paths[0].read_bytes()
    assert planned.bytes_written == len(content) - 8 - int.from_bytes(content[:8], "little")


def test_progress_reaches_the_end(method, oracle, count):
    pool, _ = oracle(method, {}, "normal", count(method, 4))
    seen = []
    merge_weights(pool, make_merge(method), progress=lambda done, total: seen.append((done, total)))
    total = sum(int(np.prod(shape)) for shape in pool.tensors.values())
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_runs_on_a_transformed_pool(method, oracle, count, tables):
    """On a pool whose task vectors are doubled a merge is what it is for the doubled experts."""
    pool, _ = oracle(method, {}, "grid", count(method, 4))
    doubled = pool.transform(lambda name, base, taus: 2 * taus, "doubled")
    base = pool.base_weights()
    one = pool.blocks("model")
    experts = {name: {**base, **pool.combine(2 * np.eye(pool.n)[i : i + 1], one)} for i, name in enumerate(pool.names)}
    found = merge_weights(doubled, make_merge(method))
    wanted = merge_weights(Pool.from_state_dicts(base, experts), make_merge(method))
    within = tables.decomposing.get(method, 2e-6)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=2e-6, atol=within, msg=name)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_an_error_and_nothing_is_written(method, value, sampled, count, tmp_path):
    base, experts = sampled("normal", count(method, 3), "float32")
    spoilt = experts["e0"]["b.weight"].clone()
    spoilt[7, 7] = value
    pool = Pool.from_state_dicts(base, {**experts, "e0": {**experts["e0"], "b.weight": spoilt}})
    with pytest.raises(PoolError, match=r"NaN or infinity|NaN and infinity|not (all )?finite"):
        write_merge(pool, make_merge(method), tmp_path / "out.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_whole_tensors_are_taken_one_expert_at_a_time(method, oracle, count, monkeypatch):
    """So memory does not grow with the number of experts."""
    merge = make_merge(method)
    if not merge.whole:
        pytest.skip("it works on pieces, of all experts")
    pool, _ = oracle(method, {}, "normal", count(method, 3))
    monkeypatch.setattr(Part, "stack", None)
    assert merge_weights(pool, merge)
    assert plan(pool, merge).host_memory > 4 * merge.held * 3000


@pytest.mark.parametrize("merge", ["ties", {"name": "ties"}, None])
def test_a_name_is_no_merge(merge):
    pool = Pool.from_state_dicts({"w": torch.zeros(3)}, {"e": {"w": torch.ones(3)}})
    with pytest.raises(OptionError, match="make_merge"):
        merge_weights(pool, merge)
    with pytest.raises(OptionError, match="make_merge"):
        merge_weights(pool, make_merge("average"), overrides=[("w", merge)])
