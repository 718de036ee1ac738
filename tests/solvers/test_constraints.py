import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mergesolve.solvers import OptionError
from mergesolve.solvers.constraints import (
    EXAMPLES,
    Binary,
    Coefficient,
    Comparison,
    ConstraintError,
    Count,
    Mean,
    Negative,
    Number,
    Over,
    expand,
    parse,
    selects_blocks,
)

numbers = st.builds(Number, st.floats(1e-6, 1e6) | st.integers(0, 99).map(float))
positive = st.builds(Number, st.floats(1e-3, 1e3))
plain = st.from_regex(r"[A-Za-z_][A-Za-z0-9_.]{0,6}(-[a-z]{1,3})?", fullmatch=True)
odd = st.text(st.characters(codec="utf-8", exclude_characters="\"'"), min_size=1, max_size=6)
names = plain | odd | st.sampled_from(["sum", "same", "count", "7b", "a'b"])
inner = st.from_regex(r"[a-z.*?]{1,5}(\[[0-9]{1,2}\])?", fullmatch=True)
blocks = st.none() | inner
items = st.lists(names | st.sampled_from(["*", "digit*", "vit-?32"]), min_size=1, max_size=3).map(tuple)


def expressions(blocks):
    leaves = st.builds(Coefficient, names, blocks) | st.builds(Over, st.just("sum"), items, blocks)
    return st.recursive(
        leaves,
        lambda terms: (
            st.builds(Negative, terms)
            | st.builds(Binary, st.sampled_from("+-"), terms, terms | numbers)
            | st.builds(Binary, st.just("*"), numbers, terms)
            | st.builds(Binary, st.just("*"), terms, numbers)
            | st.builds(Binary, st.just("/"), terms, positive)
        ),
        max_leaves=6,
    )


terms = expressions(blocks) | st.builds(Mean, expressions(st.none()), blocks)
comparisons = (
    st.builds(lambda a, o, b: Comparison((a, b), (o,)), terms, st.sampled_from(["<=", ">=", "=="]), terms | numbers)
    | st.builds(
        lambda a, b, c, o: Comparison((a, b, c), (o, o)), numbers, terms, numbers, st.sampled_from(["<=", ">="])
    )
    | st.builds(lambda a: Comparison((a,), (), True), expressions(blocks))
    | st.builds(lambda i: Comparison((Over("each", i), Number(0.5)), ("<=",)), items)
)


@given(comparisons | st.builds(Count, st.integers(1, 10**6)))
def test_what_is_printed_is_read_as_the_same(constraint):
    assert parse(str(constraint)) == constraint
    assert str(parse(str(constraint))) == str(constraint)


words = ["digits", "0.5", "<=", "==", "sum(", "mean(", "same", "each(", "count(*)", "1e999", "*)"]
pieces = st.sampled_from([*'2*/()[],-+ 0"≤\n²>', *words])


@settings(max_examples=300)
@given(st.text(max_size=30) | st.lists(pieces, max_size=14).map("".join))
def test_garbage_raises_nothing_but_the_error_that_points_at_it(text):
    try:
        constraint = parse(text)
    except ConstraintError as error:
        [note] = error.__notes__
        assert "^" in note.split("\n")[-1]
    else:
        assert parse(str(constraint)) == constraint


@pytest.mark.parametrize("text", ["(" * 5000 + "a", "-" * 5000 + "a <= 1", "+".join("a" * 3000) + " <= 1", "[" * 5000])
def test_texts_that_never_end_are_refused(text):
    with pytest.raises(ConstraintError):
        parse(text)


@pytest.mark.parametrize("text", EXAMPLES)
def test_examples_are_read(text):
    assert str(parse(text)) == text


@pytest.mark.parametrize(
    ("text", "message", "marked"),
    [
        ("digits < 0.3", "write '<='", "<"),
        ("digits = 0.3", "write '=='", "="),
        ("digits != 0.3", "not convex", "!="),
        ("digits", "a comparison is missing", None),
        ("digits*chess <= 1", "one of the two factors is a number", "*"),
        ("digits/0 <= 1", "divide by a number other than 0", "/"),
        ("1 <= 2", "names no expert", "1 <= 2"),
        ("sum(digits <= 1", "expected ',' or ')'", "<"),
        ("sum(digits + chess) <= 1", "weights stand outside", "+"),
        ("0.1 <= digits >= 0.3", "goes one way", "0.1 <= digits >= 0.3"),
        ("digits >= same", "stands alone behind '=='", "same"),
        ("mean(digits) == same", "is one number", None),
        ("mean(digits[a]) <= 1", "stand behind it", "digits"),
        ("each(a) <= each(b)", "may stand once", "each(b)"),
        ("count(*) <= 0", "'count(*) <= N'", "count(*) <= 0"),
        ("count(*) + digits <= 3", "'count(*) <= N'", None),
        ("digits 3 <= 1", "expected '<='", "3"),
        ("sum <= 1", "needs names in parentheses", "sum"),
        ("1e999 * digits <= 1", "too large", "1e999"),
        ("digits[] <= 1", "name blocks between the brackets", "[]"),
        ("'digits <= 1", "quote is not closed", "'"),
        ("", "Examples: 'sum(digits, chess) <= 0.3'", None),
    ],
)
def test_a_mistake_is_explained_and_marked(text, message, marked):
    with pytest.raises(ConstraintError) as error:
        parse(text)
    assert message in str(error.value)
    if marked is not None:
        line, carets = error.value.__notes__[0].split("\n")
        start, end = carets.index("^"), len(carets)
        assert line[start:end] == marked


def test_what_is_no_text_is_refused():
    with pytest.raises(OptionError, match="a constraint is a text"):
        parse(3)


def test_terms_multiply_out():
    form = expand(parse("-(2*digits - chess)/4 + 1 - 3*(digits + 2) <= 0").operands[0], "")
    total = {}
    for weight, leaf in form.terms:
        total[leaf.name] = total.get(leaf.name, 0) + weight
    assert total == {"digits": -3.5, "chess": 0.25}
    assert form.constant == -5


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a <= 1", False), ("count(*) <= 2", False), ("a[b] <= 1", True), ("mean(a) <= 1", True), ("a == same", True)],
)
def test_which_constraints_need_blocks(text, expected):
    assert selects_blocks(parse(text)) is expected
