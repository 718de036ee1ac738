import math

import numpy as np
import pytest
from mergesolve.solvers import OptionError
from mergesolve.solvers.constraint_rows import Coupling, Local, Names, bind
from mergesolve.solvers.constraints import ConstraintError, parse

EXPERTS = ("digits", "chess", "dice", "sun-397")
BLOCKS = ("layer.0.w[0]", "layer.0.w[1]", "layer.1.w", "head")
LAYERS = {"layer.0": [0, 1], "layer.1": [2], "head": [3]}
GROUPS = {"games": ["chess", "dice"], "d": ["di*"]}


@pytest.fixture(scope="module")
def names():
    return Names(EXPERTS, GROUPS, BLOCKS, LAYERS)


def holds(rules, point):
    """Whether all rows hold at a point."""
    for rule in rules:
        if isinstance(rule, Local):
            values = point[rule.rows] @ rule.weights
        else:
            values = np.array([np.sum(point[rule.rows, rule.columns] * rule.values)])
        if not np.all((rule.low - 1e-12 <= values) & (values <= rule.high + 1e-12)):
            return False
    return True


MEANINGS = {
    "digits <= 0.3": lambda x: np.all(x[:, 0] <= 0.3),
    "sum(games) >= 0.4": lambda x: np.all(x[:, 1] + x[:, 2] >= 0.4),
    "sum(d, digits) <= 0.5": lambda x: np.all(x[:, 0] + x[:, 2] <= 0.5),
    "2*digits + chess <= dice + 0.6": lambda x: np.all(2 * x[:, 0] + x[:, 1] - x[:, 2] <= 0.6),
    "0.1 <= each(games) <= 0.5": lambda x: np.all((x[:, 1:3] >= 0.1) & (x[:, 1:3] <= 0.5)),
    "each(*) <= 0.6": lambda x: np.all(x <= 0.6),
    "digits[layer.0] <= 0.3": lambda x: np.all(x[:2, 0] <= 0.3),
    "digits[layer.*] <= chess": lambda x: np.all(x[:3, 0] <= x[:3, 1]),
    "digits[layer.0.w[1]] <= 0.3": lambda x: x[1, 0] <= 0.3,
    "digits[layer.1] <= digits[head]": lambda x: x[2, 0] <= x[3, 0],
    "mean(digits) >= 0.3": lambda x: x[:, 0].mean() >= 0.3,
    "mean(digits - chess)[layer.0] <= 0.1": lambda x: (x[:2, 0] - x[:2, 1]).mean() <= 0.1,
    "digits <= mean(digits) + 0.2": lambda x: np.all(x[:, 0] <= x[:, 0].mean() + 0.2),
    "mean(digits + 1) <= 1.3": lambda x: x[:, 0].mean() <= 0.3,
    '"sun-397" - digits <= 0.2': lambda x: np.all(x[:, 3] - x[:, 0] <= 0.2),
    "1 >= 2*(digits + chess)": lambda x: np.all(x[:, 0] + x[:, 1] <= 0.5),
}


@pytest.mark.parametrize("text", MEANINGS)
def test_rows_hold_exactly_where_the_text_does(text, names):
    rng = np.random.default_rng(0)
    points = rng.random((400, len(BLOCKS), len(EXPERTS))) * rng.random((400, 1, 1))
    points[::2] = points[::2, :1]  # the same row everywhere satisfies more
    meant = [bool(MEANINGS[text](x)) for x in points]
    rules = bind(parse(text), 0, names)
    assert [holds(rules, x) for x in points] == meant
    assert 0 < sum(meant) < len(meant)


def test_ties_hold_where_all_blocks_agree(names):
    def tied(text):
        return holds(bind(parse(text), 0, names), point)

    point = np.tile([0.1, 0.2, 0.3, 0.4], (4, 1))
    assert tied("digits == same")
    point[3, 0] = 0.2
    assert not tied("digits == same")
    assert tied("digits[layer.*] == same")
    assert tied("chess == same")
    assert not tied("each(*) == same")
    point[3, 1] = 0.1
    assert tied("digits + chess == same")


def test_only_what_couples_blocks_is_a_coupling(names):
    assert all(isinstance(r, Local) for r in bind(parse("digits[layer.*] <= chess"), 0, names))
    [rule] = bind(parse("digits[head] - digits[head] + chess[head] <= 1"), 0, names)
    assert isinstance(rule, Local)
    [rule] = bind(parse("mean(sum(games)) >= 0.1"), 4, names)
    assert isinstance(rule, Coupling)
    assert (rule.source, rule.low, rule.high) == (4, 0.1, math.inf)
    np.testing.assert_allclose(rule.values, 0.25)
    alone = Names(EXPERTS, {}, ("model",), {})
    assert isinstance(bind(parse("mean(digits) >= 0.1"), 0, alone)[0], Local)
    assert bind(parse("digits == same"), 0, alone) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("digts <= 0.1", "unknown expert 'digts'. Did you mean 'digits'?"),
        ("games <= 0.1", "'games' is a group: write sum(games)"),
        ("sum(gams) <= 0.1", "unknown expert or group 'gams'. Did you mean 'games'?"),
        ("sum(x*) <= 0.1", "no expert matches 'x*'"),
        ("sun-397 <= 0.1", 'write it in quotes: "sun-397"'),
        ("digits-chess <= 0.1", "put spaces around the minus"),
        ("digits[layr.1] <= 0.1", "no block matches 'layr.1'. Did you mean 'layer.1'?"),
        ("digits[layer.0] == digits[head]", "[layer.0] is 2 blocks"),
        ("digits[layer.1] + chess == digits[head]", "of which block?"),
        ("digits[head] + chess == same", "name the same blocks"),
        ("digits - digits <= 1", "cancel"),
        ("1e-10 * digits >= 5e-10", "factors lie between 1e-06 and 1e+06"),
        ("1e300 * digits + chess <= 1e300", "factors lie between"),
        ("mean(digits/1e9) <= 1", "factors lie between"),
        ("digits >= 1e25", "factors lie between"),
        ("0.1*digits + 0.2*digits - 0.3*digits <= 0", "cancel"),
        ("mean(0.1*digits + 0.2*digits - 0.3*digits) <= 0", "cancel"),
        ("0.1*digits + 0.2*digits - 0.3*digits == same", "cancel"),
        ("digits[layer.1] - digits[layer.1] + digits[head] - digits[head] <= 1", "cancel"),
    ],
)
def test_names_that_are_not_there_are_explained(text, message, names):
    with pytest.raises(ConstraintError) as error:
        bind(parse(text), 0, names)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"digits": ["chess"]}, "an expert has that name"),
        ({"g": ["ches"]}, "Did you mean 'chess'"),
        ({"g": ["x*"]}, "no expert"),
    ],
)
def test_groups_need_names_of_their_own_and_members(groups, message):
    with pytest.raises(OptionError, match=message):
        Names(EXPERTS, groups, BLOCKS, LAYERS)
