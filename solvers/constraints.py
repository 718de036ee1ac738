"""The language of linear constraints on coefficients: `sum(digits, chess) <= 0.3`, `mean(group_a) >= 0.1`, ...

    constraint := sum-of-terms (("<=" | ">=" | "==") sum-of-terms)+  |  sum-of-terms "==" "same"  |  "count(*) <=" N
    term       := number | NAME | "sum(" names ")" | "each(" names ")" | "mean(" terms ")" | "(" terms ")"
    term       := term "*" term | term "/" number | "-" term          (one factor of a product is a number)
    NAME, sum(...), each(...), mean(...) may be followed by [BLOCKS]

A NAME is the coefficient of an expert; in the names of sum and each, groups and globs stand for several. Without
mean, a constraint holds in every block by itself, or in those that match [BLOCKS]; terms of different single blocks,
mean (over blocks) and `== same` couple blocks. Reading needs no names; :mod:`.constraint_rows` makes linear
inequalities of what was read, for the experts and blocks of a problem. str() of what was read is read as the same.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import NamedTuple

from .errors import OptionError

Span = tuple[int, int]
EXAMPLES = (
    "sum(digits, chess) <= 0.3",
    "digits >= 0.05",
    "2*digits + chess <= 0.5",
    "each(*) <= 0.5",
    "digits[layers.0*] <= 0.1",
    "mean(digits) >= 0.1",
    "digits == same",
    "count(*) <= 3",
)
RESERVED = ("sum", "mean", "each", "count", "same")
DEEPEST, LONGEST = 40, 200  # nested parentheses; operators in one constraint
SMALLEST, LARGEST = 1e-6, 1e6  # factors of coefficients

_NAME = re.compile(r"[^\W\d][\w.]*(?:-[^\W\d][\w.]*)*")
_PATTERN = re.compile(r"[\w.*?-]+")
_NUMBER = re.compile(r"(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?", re.ASCII)
_SPACE = re.compile(r"\s*")
_COMPARISON = re.compile(r"<=|>=|==|≤|≥|=<|=>|<|>|!=|=")
_SPELLED = {"<=": "<=", ">=": ">=", "==": "==", "≤": "<=", "≥": ">="}


class ConstraintError(OptionError):
    """A constraint that cannot be read, or that names what is not there. A note of it points at the place."""

    def __init__(self, text: str, span: Span, problem: str) -> None:
        start, end = span
        shown = "".join(c if c.isprintable() else " " for c in text)
        super().__init__(f"constraint '{shown}': {problem}")
        self.add_note(f"  {shown}\n  {' ' * start}{'^' * max(1, end - start)}")


# What a constraint is made of. ``at`` is its place in the text and no part of its meaning.


@dataclass(frozen=True)
class Number:
    """A number that is not negative."""

    value: float
    at: Span = field(default=(0, 0), compare=False)

    def __str__(self) -> str:
        return repr(self.value).removesuffix(".0")


@dataclass(frozen=True)
class Coefficient:
    """The coefficient of one expert, in the blocks that match ``block`` (None: any)."""

    name: str
    block: str | None = None
    at: Span = field(default=(0, 0), compare=False)

    def __str__(self) -> str:
        return _quoted(self.name, _NAME) + _selector(self.block)


@dataclass(frozen=True)
class Over:
    """sum(...) or each(...) over experts, groups and globs."""

    function: str
    items: tuple[str, ...]
    block: str | None = None
    at: Span = field(default=(0, 0), compare=False)
    places: tuple[Span, ...] = field(default=(), compare=False)

    def __str__(self) -> str:
        return f"{self.function}({', '.join(_quoted(i, _PATTERN) for i in self.items)}){_selector(self.block)}"


@dataclass(frozen=True)
class Mean:
    """The mean over blocks of what it holds."""

    inner: Expression
    block: str | None = None
    at: Span = field(default=(0, 0), compare=False)

    def __str__(self) -> str:
        return f"mean({self.inner}){_selector(self.block)}"


@dataclass(frozen=True)
class Negative:
    """The negative of what it holds."""

    inner: Expression
    at: Span = field(default=(0, 0), compare=False)

    def __str__(self) -> str:
        return f"-({self.inner})" if isinstance(self.inner, Binary) else f"-{self.inner}"


@dataclass(frozen=True)
class Binary:
    """left + right, left - right, left * right, left / right."""

    operator: str
    left: Expression
    right: Expression
    at: Span = field(default=(0, 0), compare=False)

    def __str__(self) -> str:
        product = self.operator in "*/"
        weaker = isinstance(self.left, Binary) and product and self.left.operator in "+-"
        left = f"({self.left})" if weaker else str(self.left)
        binary = isinstance(self.right, Binary) and (product or self.right.operator in "+-")
        right = f"({self.right})" if binary else str(self.right)
        return f"{left}{self.operator}{right}" if product else f"{left} {self.operator} {right}"


Leaf = Coefficient | Over | Mean
Expression = Number | Leaf | Negative | Binary


@dataclass(frozen=True)
class Comparison:
    """operands[0] operators[0] operands[1] ..., or operands[0] == same."""

    operands: tuple[Expression, ...]
    operators: tuple[str, ...]
    same: bool = False
    text: str = field(default="", compare=False)

    def __str__(self) -> str:
        parts = [str(self.operands[0])]
        for operator, operand in zip(self.operators, self.operands[1:], strict=True):
            parts += [operator, str(operand)]
        return " ".join(parts) + (" == same" if self.same else "")


@dataclass(frozen=True)
class Count:
    """count(*) <= limit: how many experts a block may use."""

    limit: int
    text: str = field(default="", compare=False)

    def __str__(self) -> str:
        return f"count(*) <= {self.limit}"


Constraint = Comparison | Count


def _quoted(name: str, bare: re.Pattern[str]) -> str:
    if bare.fullmatch(name) and name not in RESERVED:
        return name
    return f'"{name}"' if '"' not in name else f"'{name}'"


def _selector(block: str | None) -> str:
    return "" if block is None else f"[{block}]"


class _Reader:
    """A recursive descent over one text; a position that only moves forward."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.place = 0
        self.depth = 0
        self.operators = 0

    def fail(self, problem: str, start: int | None = None, end: int | None = None) -> ConstraintError:
        start = self.place if start is None else start
        return ConstraintError(self.text, (start, start + 1 if end is None else end), problem)

    def space(self) -> None:
        found = _SPACE.match(self.text, self.place)
        self.place = found.end() if found else self.place

    def match(self, pattern: re.Pattern[str]) -> tuple[str, Span] | None:
        """Take what the pattern matches here, after white space."""
        self.space()
        found = pattern.match(self.text, self.place)
        if not found or not found.group():
            return None
        self.place = found.end()
        return found.group(), found.span()

    def take(self, symbol: str) -> bool:
        self.space()
        if not self.text.startswith(symbol, self.place):
            return False
        self.place += len(symbol)
        return True

    def expect(self, symbol: str, after: str) -> None:
        if not self.take(symbol):
            raise self.fail(f"expected '{symbol}' {after}, found {self.here()}.")

    def here(self) -> str:
        """What stands here, for a message."""
        self.space()
        rest = self.text[self.place :].split()
        return f"'{rest[0][:20]}'" if rest else "the end"

    def constraint(self) -> Constraint:
        """The whole text."""
        if not self.text.strip():
            raise self.fail(f"it is empty. Examples: {examples()}.")
        self.space()
        if re.compile(r"count\s*\(").match(self.text, self.place):
            return self.count()
        operands, operators = [self.terms()], []
        same = False
        while self.place < len(self.text.rstrip()):
            operators.append(self.comparison())
            start = self.place
            word = self.match(_NAME)
            if word is not None and word[0] == "same":
                operator = operators.pop()
                if operator != "==" or operators or self.here() != "the end":
                    raise self.fail(
                        "'same' stands alone behind '==', as in 'digits == same': the coefficient of digits is the "
                        "same in all blocks.",
                        *word[1],
                    )
                same = True
                break
            self.place = start
            operands.append(self.terms())
        if not operators and not same:
            end = len(self.text)
            raise self.fail(f"a comparison is missing: '<=', '>=' or '=='. Examples: {examples()}.", end, end + 1)
        if len({operator for operator in operators if operator != "=="}) > 1:
            raise self.fail("a chain of comparisons goes one way, as in '0.1 <= digits <= 0.3'.", 0, len(self.text))
        return Comparison(tuple(operands), tuple(operators), same, self.text)

    def comparison(self) -> str:
        found = self.match(_COMPARISON)
        if found is None:
            raise self.fail(
                f"expected '<=', '>=' or '==', found {self.here()}. A product needs '*', and a name with other "
                "characters than letters, digits, '_', '.' and inner '-' stands in quotes."
            )
        symbol, span = found
        if symbol in _SPELLED:
            return _SPELLED[symbol]
        if symbol in ("<", ">"):
            raise self.fail(f"write '{symbol}=': the set has to be closed, so that it holds its best point.", *span)
        meant = {"=": "==", "=<": "<=", "=>": ">="}.get(symbol)
        if meant is None:
            raise self.fail("'!=' leaves a set that is not convex; use '<=', '>=' or '=='.", *span)
        raise self.fail(f"write '{meant}' instead of '{symbol}'.", *span)

    def count(self) -> Count:
        start = self.place
        form = re.compile(r"count\s*\(\s*\*\s*\)\s*(?:<=|≤)\s*(\d{1,9})\s*$", re.ASCII).match(self.text, self.place)
        if form is None or int(form.group(1)) < 1:
            raise self.fail(
                "a sparsity budget has the form 'count(*) <= N', with a whole number N of at least 1.",
                start,
                len(self.text.rstrip()),
            )
        return Count(int(form.group(1)), self.text)

    def terms(self) -> Expression:
        left = self.product()
        while True:
            self.space()
            start = self.place
            operator = "+" if self.take("+") else "-" if self.take("-") else None
            if operator is None:
                return left
            left = self.binary(operator, left, self.product(), start)

    def product(self) -> Expression:
        left = self.factor()
        while True:
            self.space()
            start = self.place
            operator = "*" if self.take("*") else "/" if self.take("/") else None
            if operator is None:
                return left
            left = self.binary(operator, left, self.factor(), start)

    def binary(self, operator: str, left: Expression, right: Expression, start: int) -> Binary:
        self.operators += 1
        if self.operators > LONGEST:
            raise self.fail(f"it has more than {LONGEST} operators; use sum(...) with a group or a glob.", start)
        return Binary(operator, left, right, (start, start + 1))

    def factor(self) -> Expression:
        self.depth += 1
        if self.depth > DEEPEST:
            raise self.fail(f"it is nested more than {DEEPEST} deep.")
        try:
            self.space()
            start = self.place
            if self.take("-"):
                return Negative(self.factor(), (start, start + 1))
            if self.take("("):
                inner = self.terms()
                self.expect(")", "to close the parenthesis")
                return inner
            return self.leaf()
        finally:
            self.depth -= 1

    def leaf(self) -> Expression:
        number = self.match(_NUMBER)
        if number is not None:
            value = float(number[0])
            if not math.isfinite(value):
                raise self.fail("the number is too large.", *number[1])
            return Number(value, number[1])
        self.space()
        start = self.place
        quoted = self.string()
        if quoted is not None:
            return Coefficient(quoted, self.selector(), (start, self.place))
        word = self.match(_NAME)
        if word is None:
            raise self.fail(f"expected an expert, a number, sum(...), each(...) or mean(...), found {self.here()}.")
        name, span = word
        if name in ("sum", "each") and self.take("("):
            items, places = self.names(name)
            return Over(name, items, self.selector(), (start, self.place), places)
        if name == "mean" and self.take("("):
            inner = self.terms()
            self.expect(")", "to close mean(")
            return Mean(inner, self.selector(), (start, self.place))
        if name == "count":
            raise self.fail("count stands at the beginning, in the form 'count(*) <= N'.", *span)
        if name in RESERVED:
            form = "stands alone behind '=='" if name == "same" else f"needs names in parentheses, as in {name}(digits)"
            raise self.fail(f"'{name}' {form}; an expert of that name is written in quotes, \"{name}\".", *span)
        return Coefficient(name, self.selector(), span)

    def names(self, function: str) -> tuple[tuple[str, ...], tuple[Span, ...]]:
        items: list[str] = []
        places: list[Span] = []
        while True:
            self.space()
            start = self.place
            quoted = self.string()
            if quoted is None:
                found = self.match(_PATTERN)
                if found is None:
                    raise self.fail(f"expected an expert, a group or a glob in {function}(...), found {self.here()}.")
                quoted = found[0]
            items.append(quoted)
            places.append((start, self.place))
            if self.take(")"):
                return tuple(items), tuple(places)
            if not self.take(","):
                raise self.fail(
                    f"expected ',' or ')' in {function}(...), found {self.here()}. It takes names alone; weights stand "
                    "outside, as in 2*digits + chess."
                )

    def string(self) -> str | None:
        """A name in quotes, if one stands here."""
        self.space()
        quote = self.text[self.place : self.place + 1]
        if quote not in ("'", '"') or not quote:
            return None
        end = self.text.find(quote, self.place + 1)
        if end < 0:
            raise self.fail("the quote is not closed.")
        if end == self.place + 1:
            raise self.fail("the name in quotes is empty.", self.place, end + 1)
        name = self.text[self.place + 1 : end]
        self.place = end + 1
        return name

    def selector(self) -> str | None:
        """[BLOCKS], if it stands here; brackets inside are part of it."""
        self.space()
        if not self.text.startswith("[", self.place):
            return None
        depth = 0
        for end in range(self.place, len(self.text)):
            depth += {"[": 1, "]": -1}.get(self.text[end], 0)
            if depth == 0:
                block = self.text[self.place + 1 : end].strip()
                if not block:
                    raise self.fail("name blocks between the brackets, as in digits[layers.0*].", None, end + 1)
                self.place = end + 1
                return block
        raise self.fail("the bracket is not closed.")


def examples() -> str:
    """Some constraints, for messages."""
    return ", ".join(f"'{text}'" for text in EXAMPLES)


def parse(text: str) -> Constraint:
    """Read one constraint. Raises ConstraintError, whose note points at the place."""
    if not isinstance(text, str):
        raise OptionError(f"a constraint is a text, such as '{EXAMPLES[0]}'; found {text!r}.")
    constraint = _Reader(text).constraint()
    if isinstance(constraint, Comparison):
        linear(constraint)
    return constraint


class Linear(NamedTuple):
    """Σ weight · leaf + constant."""

    terms: tuple[tuple[float, Leaf], ...]
    constant: float


def linear(constraint: Comparison) -> tuple[Linear, ...]:
    """The operands as linear forms. Raises ConstraintError for products of coefficients, and forms without any."""
    text = constraint.text or str(constraint)
    forms = tuple(expand(operand, text) for operand in constraint.operands)
    leaves = [leaf for form in forms for _, leaf in form.terms]
    whole = (0, len(text))
    if not leaves:
        raise ConstraintError(text, whole, f"it names no expert. Examples: {examples()}.")
    repeated = [leaf for leaf in leaves if isinstance(leaf, Over) and leaf.function == "each"]
    if len(repeated) > 1:
        raise ConstraintError(text, repeated[1].at, "each(...) may stand once in a constraint.")
    if constraint.same and any(isinstance(leaf, Mean) for leaf in leaves):
        raise ConstraintError(text, whole, "a mean over blocks is one number, so '== same' says nothing about it.")
    if not all(math.isfinite(x) for form in forms for x in (form.constant, *(weight for weight, _ in form.terms))):
        raise ConstraintError(text, whole, "its numbers are too large.")
    return forms


def check_size(forms: tuple[Linear, ...], text: str) -> None:
    """Raise ConstraintError for factors so large or small that a constraint could not hold to 1e-9, or always would."""
    leaves = [leaf for form in forms for _, leaf in form.terms]
    inner = tuple(expand(leaf.inner, text, inside=True) for leaf in leaves if isinstance(leaf, Mean))
    factors = [abs(weight) for form in (*forms, *inner) for weight, _ in form.terms if weight]
    constants = [abs(form.constant) for form in (*forms, *inner)]
    if not all(SMALLEST <= factor <= LARGEST for factor in factors) or max(constants) > LARGEST:
        raise ConstraintError(
            text,
            (0, len(text)),
            f"its numbers are too large or too small: factors lie between {SMALLEST:g} and {LARGEST:g}, since a "
            "constraint holds to 1e-9. Divide it by a number that brings them near 1.",
        )


def expand(expression: Expression, text: str, *, inside: bool = False) -> Linear:
    """Multiply out. ``inside``: of a mean, where blocks are not selected."""
    if isinstance(expression, Number):
        return Linear((), expression.value)
    if isinstance(expression, Negative):
        return scaled(expand(expression.inner, text, inside=inside), -1.0)
    if isinstance(expression, Binary):
        left = expand(expression.left, text, inside=inside)
        right = expand(expression.right, text, inside=inside)
        if expression.operator in "+-":
            right = scaled(right, -1.0 if expression.operator == "-" else 1.0)
            return Linear(left.terms + right.terms, left.constant + right.constant)
        if expression.operator == "/":
            if right.terms or right.constant == 0:
                raise ConstraintError(text, expression.at, "a constraint is linear: divide by a number other than 0.")
            return Linear(
                tuple((weight / right.constant, leaf) for weight, leaf in left.terms), left.constant / right.constant
            )
        if left.terms and right.terms:
            raise ConstraintError(text, expression.at, "a constraint is linear: one of the two factors is a number.")
        return scaled(left, right.constant) if left.terms else scaled(right, left.constant)
    if inside:
        if isinstance(expression, Mean):
            raise ConstraintError(text, expression.at, "a mean inside of a mean says nothing more.")
        if expression.block is not None:
            raise ConstraintError(
                text, expression.at, "the blocks of a mean stand behind it, as in mean(digits)[layers.0*]."
            )
        if isinstance(expression, Over) and expression.function == "each":
            raise ConstraintError(text, expression.at, "each(...) stands outside of mean; sum(...) may stand inside.")
    if isinstance(expression, Mean):
        inner = expand(expression.inner, text, inside=True)
        if not inner.terms:
            raise ConstraintError(text, expression.at, "mean(...) holds no expert.")
    return Linear(((1.0, expression),), 0.0)


def scaled(form: Linear, factor: float) -> Linear:
    """Return factor · form."""
    return Linear(tuple((weight * factor, leaf) for weight, leaf in form.terms), form.constant * factor)


def selects_blocks(constraint: Constraint) -> bool:
    """Whether it can be understood only with the names or the number of blocks: a selector, a mean, `same`."""
    if isinstance(constraint, Count):
        return False
    leaves = [leaf for form in linear(constraint) for _, leaf in form.terms]
    return constraint.same or any(isinstance(leaf, Mean) or leaf.block is not None for leaf in leaves)
