"""Blocks partition the parameters: every row belongs to something, every tensor has its rows."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mergesolve.pools import KINDS, PoolError
from mergesolve.pools.blocks import layer_of, make_blocks

parts = st.sampled_from(["weight", "bias", "attn", "mlp", "blocks", "layers", "0", "1", "10", "ln"])
names = st.lists(st.lists(parts, min_size=1, max_size=5).map(".".join), min_size=1, max_size=8, unique=True)
shapes = names.flatmap(
    lambda found: st.fixed_dictionaries({name: st.lists(st.integers(1, 4), max_size=3).map(tuple) for name in found})
)


@given(shapes, st.sampled_from([*KINDS, (r"^b", "attn|mlp", ".*")]))
def test_rows_and_layers_are_partitions(table, kind):
    try:
        blocks = make_blocks(kind, table)
    except PoolError:
        assert not isinstance(kind, str)  # a pattern without a tensor
        return
    assert list(blocks.rows) == list(table)
    assert len(blocks.names) == blocks.count == len(set(blocks.names))
    used = np.concatenate([np.arange(part.start, part.stop) for part in blocks.rows.values()])
    assert set(used) == set(range(blocks.count))
    assert sorted(np.concatenate(list(blocks.layers.values()))) == list(range(blocks.count))
    for name, part in blocks.rows.items():
        rows = table[name][0] if kind == "row" and table[name] else 1
        assert part.stop - part.start == rows


@given(shapes)
def test_kinds_refine_one_another(table):
    """Tensors that share a row by a finer kind share it by a coarser one."""
    layer, tensor, model = (make_blocks(kind, table) for kind in ("layer", "tensor", "model"))
    for name, part in tensor.rows.items():
        assert layer.names[layer.rows[name].start] == layer_of(name)
        assert any(part.start in rows for key, rows in tensor.layers.items() if key == layer_of(name))
    assert list(model.layers) == ["model"]


def test_row_names_carry_indices():
    blocks = make_blocks("row", {"w": (2, 3), "s": ()})
    assert blocks.names == ("w[0]", "w[1]", "s[0]")


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("transformer.resblocks.3.attn.in_proj_weight", "transformer.resblocks.3"),
        ("vision_model.encoder.layers.11.mlp.fc1.bias", "vision_model.encoder.layers.11"),
        ("stages.2.blocks.3.mlp.fc1.weight", "stages.2.blocks.3"),
        ("stages.2.blocks.3.gamma", "stages.2.blocks.3"),
        ("stages.2.downsample.0.weight", "stages.2"),
        ("layers.3.mlp.0.weight", "layers.3"),
        ("layer1.0.conv1.weight", "layer1.0"),
        ("net.0.weight", "net.0"),
        ("0.weight", "0"),
        ("ln_pre.weight", "ln_pre"),
        ("class_embedding", "class_embedding"),
    ],
)
def test_layers_of_known_architectures(name, layer):
    assert layer_of(name) == layer


def test_patterns_take_the_first_match_and_keep_their_order():
    blocks = make_blocks(["mlp", r"\.weight$", ".*"], {"a.weight": (2,), "a.bias": (2,), "mlp.weight": (2,)})
    assert blocks.names == ("mlp", r"\.weight$", ".*")
    assert [blocks.rows[name].start for name in ("a.weight", "a.bias", "mlp.weight")] == [1, 2, 0]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("layers", "unknown kind 'layers'.* Did you mean 'layer'"),
        (["a"], r"no pattern matches 'b'; add a last pattern '\.\*'"),
        ([".*", "a"], "'a' is left without a tensor"),
        (["(", ".*"], "not a regular expression"),
        ([], "at least one"),
        ([".*", ".*"], "must be distinct"),
        ([3], "must be a string"),
    ],
)
def test_mistakes(kind, message):
    with pytest.raises(PoolError, match=message):
        make_blocks(kind, {"a": (2,), "b": (2,)})
