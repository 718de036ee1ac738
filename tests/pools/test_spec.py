"""What the user names: YAML files, globs, names, patterns, renaming; and the messages for what cannot be."""

import re
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
import yaml
from hypothesis import given
from mergesolve.pools import Pool, PoolError
from mergesolve.pools.blocks import natural
from mergesolve.pools.compatibility import rename, select
from mergesolve.pools.spec import DTYPES, FIELDS, expand_experts, expert_name, parse_dtype, parse_spec
from safetensors.torch import save_file

words = st.text("abcxyz019_-", min_size=1, max_size=8)
names = st.lists(st.lists(words, min_size=1, max_size=4).map(".".join), unique=True, max_size=8)


def model(seed, **more):
    generator = torch.Generator().manual_seed(seed)
    return {"w": torch.randn(3, 2, generator=generator), "b": torch.randn(3, generator=generator), **more}


@pytest.fixture
def folder(tmp_path):
    for i, name in enumerate(["base", "e1", "e2", "e10"]):
        save_file(model(i), tmp_path / f"{name}.safetensors")
    (tmp_path / "notes.txt").write_text("not a checkpoint")
    return tmp_path


def write(folder, fields):
    path = folder / "pool.yaml"
    path.write_text(fields if isinstance(fields, str) else yaml.safe_dump(fields))
    return path


class TestYaml:
    """The YAML file of a pool."""

    def test_paths_are_relative_to_the_file(self, folder, monkeypatch, tmp_path_factory):
        path = write(folder, {"base": "base.safetensors", "experts": {"a": "e1.safetensors", "b": "e2.safetensors"}})
        monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
        assert Pool.open(path).names == ("a", "b")

    def test_globs_leave_out_the_base_and_sort_naturally(self, folder):
        path = write(folder, {"base": "base.safetensors", "experts": ["*"]})
        assert Pool.open(path).names == ("e1", "e2", "e10")

    def test_every_field(self, folder):
        path = write(
            folder,
            {
                "base": "base.safetensors",
                "experts": ["e1.safetensors"],
                "include": ["net"],
                "exclude": ["b$"],
                "rename": {"": "net."},
                "dtype": "bf16",
            },
        )
        pool = Pool.open(path)
        assert list(pool.tensors) == ["net.w"]
        assert pool.carried == ("net.b",)
        assert pool.dtype == torch.bfloat16

    def test_a_mapping_has_the_same_fields(self, folder):
        pool = Pool.open({"base": str(folder / "base.safetensors"), "experts": [str(folder / "e1.safetensors")]})
        assert pool.names == ("e1",)

    def test_arguments_win_over_the_file(self, folder, monkeypatch):
        path = write(folder, {"base": "nowhere.safetensors", "experts": ["e1.safetensors"], "exclude": ["w"]})
        monkeypatch.chdir(folder)
        pool = Pool.open(path, base="base.safetensors", exclude=["b"])
        assert list(pool.tensors) == ["w"]

    def test_an_unknown_field_is_named_with_the_valid_ones_and_the_nearest(self, folder):
        path = write(folder, {"base": "base.safetensors", "expert": ["e1.safetensors"]})
        with pytest.raises(
            PoolError, match=r"unknown field 'expert'; the fields are base, experts, .* Did you mean 'experts'\?"
        ):
            Pool.open(path)

    @given(field=words.filter(lambda word: word not in FIELDS))
    def test_any_unknown_field_is_refused(self, field):
        with pytest.raises(PoolError, match=re.escape(f"unknown field {field!r}")):
            parse_spec({"base": "b", "experts": ["e"], field: 1}, {})

    @given(
        experts=st.dictionaries(words, words, min_size=1, max_size=5),
        include=st.lists(words, max_size=3),
        prefixes=st.dictionaries(words, words, max_size=3),
        dtype=st.none() | st.sampled_from(sorted(DTYPES)),
    )
    def test_what_is_written_is_what_is_parsed(self, tmp_path_factory, experts, include, prefixes, dtype):
        folder = tmp_path_factory.mktemp("spec")
        fields = {"base": "b.pt", "experts": experts, "include": include, "rename": prefixes, "dtype": dtype}
        spec = parse_spec(write(folder, fields), {})
        assert spec.base == str(folder / "b.pt")
        assert spec.experts == {name: str(folder / path) for name, path in experts.items()}
        assert spec.include == tuple(include)
        assert spec.rename == prefixes
        assert spec.dtype == parse_dtype(dtype, "dtype")

    @given(st.text(max_size=40))
    def test_any_text_is_parsed_or_refused_with_a_pool_error(self, tmp_path_factory, text):
        path = tmp_path_factory.mktemp("text") / "pool.yaml"
        path.write_bytes(text.encode("utf-8"))
        with pytest.raises(PoolError):
            Pool.open(path)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ("[1, 2]", "holds list; expected fields"),
            ("base: [", "is not a YAML file"),
            ("experts: [e1.safetensors]", "'base' is missing"),
            ("base: base.safetensors", "'experts' is missing"),
            ("base: base.safetensors\nexperts: []", "there are no experts"),
            ("base: base.safetensors\nexperts: {}", "there are no experts"),
            ("base: base.safetensors\nexperts: 3", "experts must be a mapping of names to paths, or a list"),
            ("base: 3\nexperts: [e1.safetensors]", "base must be a path; got 3"),
            ("base: base.safetensors\nexperts: {a: 3}", "expert 'a' must be a path"),
            ("base: base.safetensors\nexperts: ['x*']", "'.*x\\*' matches no checkpoints"),
            ("base: base.safetensors\nexperts: ['*.txt']", "matches no checkpoints \\(1 other files\\)"),
            ("base: base.safetensors\nexperts: [e1.safetensors, e1.safetensors]", "two experts are called 'e1'"),
            ("base: base.safetensors\nexperts: {base: e1.safetensors}", "cannot be called 'base'"),
            ("base: base.safetensors\nexperts: [e1.safetensors]\ninclude: {a: 1}", "include must be a list"),
            ("base: base.safetensors\nexperts: [e1.safetensors]\ninclude: ['(']", "'\\(' is not a regular expression"),
            (
                "base: base.safetensors\nexperts: [e1.safetensors]\ninclude: ['zzz']",
                "no floating-point tensors that pass",
            ),
            ("base: base.safetensors\nexperts: [e1.safetensors]\nrename: [a]", "rename must map prefixes"),
            (
                "base: base.safetensors\nexperts: [e1.safetensors]\nrename: {w: b}",
                "after renaming, 'w' and 'b'|'b' and 'w'",
            ),
            (
                "base: base.safetensors\nexperts: [e1.safetensors]\ndtype: flaot16",
                "dtype must be one of .* Did you mean 'float16'",
            ),
            ("base: base.safetensors\nexperts: [nowhere.safetensors]", "nowhere.safetensors does not exist"),
        ],
    )
    def test_mistakes(self, folder, fields, message):
        with pytest.raises(PoolError, match=message):
            Pool.open(write(folder, fields))

    def test_a_file_that_does_not_exist(self, tmp_path):
        with pytest.raises(PoolError, match=r"pool\.yaml does not exist"):
            Pool.open(tmp_path / "pool.yaml")

    def test_hub_ids_stay_as_they_are(self, tmp_path):
        path = write(tmp_path, {"base": "owner/name", "experts": ["other/name"]})
        spec = parse_spec(path, {})
        assert (spec.base, spec.experts) == ("owner/name", {"name": "other/name"})

    def test_a_missing_file_is_named_by_its_full_path_and_is_no_hub_id(self, tmp_path):
        (tmp_path / "experts").mkdir()
        fields = {"base": "owner/model-v1.5", "experts": {"a": "experts/missing", "b": "else/missing.safetensors"}}
        spec = parse_spec(write(tmp_path, fields), {})
        assert spec.base == "owner/model-v1.5"
        assert spec.experts == {
            "a": str(tmp_path / "experts" / "missing"),
            "b": str(tmp_path / "else" / "missing.safetensors"),
        }

    def test_path_objects_are_no_hub_ids(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert parse_spec(None, {"base": Path("owner/name"), "experts": ["a/b"]}).base == str(tmp_path / "owner/name")


class TestNames:
    """Experts named by their paths."""

    @given(st.lists(words, min_size=1, max_size=3), words, st.sampled_from([".safetensors", ".pt", ".bin", ".pth"]))
    def test_files_are_named_by_their_stem(self, folders, stem, suffix):
        assert expert_name("/".join([*folders, stem + suffix])) == stem

    @given(st.lists(words, min_size=1, max_size=3))
    def test_folders_and_their_standard_files_are_named_by_the_folder(self, folders):
        path = "/".join(folders)
        assert expert_name(path) == folders[-1]
        assert expert_name(f"/{path}/model.safetensors") == folders[-1]

    @given(st.dictionaries(words, words, min_size=1))
    def test_a_mapping_keeps_its_order(self, mapping):
        assert list(expand_experts(mapping).items()) == [(name, str(Path(path))) for name, path in mapping.items()]


class TestPatterns:
    """include, exclude and rename."""

    @given(names)
    def test_no_pattern_keeps_everything(self, everything):
        assert select(everything, [], []) == everything

    @given(names, st.lists(words, max_size=3), st.lists(words, max_size=3))
    def test_selection_is_what_the_expressions_say(self, everything, include, exclude):
        kept = select(everything, include, exclude)
        for name in everything:
            wanted = not include or any(re.search(pattern, name) for pattern in include)
            assert (name in kept) == (wanted and not any(re.search(pattern, name) for pattern in exclude))
        assert kept == [name for name in everything if name in kept]

    @given(names, words, words)
    def test_a_renamed_prefix_can_be_renamed_back(self, everything, old, new):
        for name in everything:
            full = old + name
            assert rename(rename(full, {old: new}), {new: old}) == full

    @given(st.lists(words, min_size=1, max_size=4).map(".".join))
    def test_the_longest_prefix_wins_and_applies_once(self, name):
        assert rename("ab." + name, {"ab.": "ab.ab.", "a": "z"}) == "ab.ab." + name

    @given(names)
    def test_natural_order_sorts_numbers_as_numbers(self, everything):
        assert sorted(everything, key=natural) == sorted(sorted(everything, reverse=True), key=natural)
        assert sorted(["l.10.w", "l.9.w", "l.2.w"], key=natural) == ["l.2.w", "l.9.w", "l.10.w"]


class TestCompatibility:
    """Every difference between models is named at once, with expert, file, tensor, found, expected and remedy."""

    def test_all_differences_at_once(self, folder):
        save_file({"w": torch.ones(3, 2)}, folder / "short.safetensors")
        save_file(model(1, extra=torch.ones(4)), folder / "long.safetensors")
        save_file({"w": torch.ones(2, 3), "b": torch.ones(3, dtype=torch.int64)}, folder / "odd.safetensors")
        with pytest.raises(PoolError) as error:
            Pool.open(
                base=folder / "base.safetensors",
                experts=[folder / f"{n}.safetensors" for n in ("short", "long", "odd")],
            )
        text = str(error.value)
        assert f"expert 'short' ({folder}/short.safetensors) lacks 'b' [3], which the base has" in text
        assert f"expert 'long' ({folder}/long.safetensors) also has 'extra' [4], which the base has not" in text
        assert f"expert 'odd' ({folder}/odd.safetensors) has 'w' of shape [2, 3], the base [3, 2]" in text
        assert f"expert 'odd' ({folder}/odd.safetensors) stores 'b' as int64 [3], the base as float32 [3]" in text
        assert "exclude" in text
        assert "rename" in text

    def test_what_is_excluded_may_differ(self, folder):
        save_file({"w": model(7)["w"], "head": torch.ones(9)}, folder / "other.safetensors")
        pool = Pool.open(
            base=folder / "base.safetensors", experts=[folder / "other.safetensors"], exclude=["^b$", "^head$"]
        )
        assert list(pool.tensors) == ["w"]
        assert pool.carried == ("b",)

    def test_integer_buffers_are_the_bases_affair(self, tmp_path):
        base = model(0, steps=torch.tensor(3))
        experts = {
            "with": model(1, steps=torch.tensor(9)),
            "without": model(2),
            "more": model(3, other=torch.tensor(1)),
        }
        pool = Pool.from_state_dicts(base, experts)
        assert pool.carried == ("steps",)
        assert int(pool.base_weights()["steps"]) == 3

    def test_a_base_of_integers_is_refused(self):
        with pytest.raises(PoolError, match="has no floating-point tensors"):
            Pool.from_state_dicts(
                {"i": torch.ones(2, dtype=torch.int32)}, {"a": {"i": torch.ones(2, dtype=torch.int32)}}
            )

    def test_different_float_types_can_be_merged(self):
        pool = Pool.from_state_dicts(
            {k: v.half() for k, v in model(0).items()},
            {"a": model(1), "b": {k: v.double() for k, v in model(2).items()}},
        )
        vertex = pool.combine([[0.0, 1.0]], pool.blocks("model"))
        torch.testing.assert_close(vertex["w"], model(2)["w"])
