"""Block-coordinate Frank-Wolfe: each block of the merge goes its own way at its own step.

    for each chosen block b:   D_b = V_b − Λ_b,   Λ_b ← Λ_b + γ_b D_b,   V = argmin ⟨V, S⟩ (block by block)

Each step fits its own block: on a separable objective every block goes as if it were alone. The gap is a sum over
blocks, gap = Σ_b ⟨S_b, Λ_b − V_b⟩, and says which block has most to gain. A model's gradient gives the scores of all
blocks at once, so fewer blocks than all in an iteration save no gradient, only reading. Choose it for layers or rows
whose scores differ in scale; rows that a constraint couples move together.
Source: Lacoste-Julien, Jaggi, Schmidt and Pletscher (2013), Block-Coordinate Frank-Wolfe for Structural SVMs;
gap-weighted order: Osokin et al. (2016), Minding the Gaps for Block Frank-Wolfe Optimization.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from .errors import OptionError, check_choice, check_number
from .problem import Evaluation, Line, MatrixProblem
from .solver import Clock, Solver, State, Step, require_oracle
from .step_rules import SEARCH, Backtracking, Memory, Search, StepRule, make_step_rule

Array = np.ndarray[Any, Any]
FULL, CYCLIC, RANDOM, GAP = "full", "cyclic", "random", "gap"


@dataclass(frozen=True)
class BlockFrankWolfe(Solver):
    """Block-coordinate Frank-Wolfe: a step of its own for each block.

    order: which blocks move in an iteration: "full" (all), or `blocks_per_step` of them: "cyclic", "random", or with a
    probability in proportion to their "gap". step_rule: "backtracking" and "short-step" find all steps at once, with
    one smoothness; schedules count passes over all blocks; every other rule searches one block after the other, where
    each after the first costs a gradient for its slope and a value. seed: of the random choices.
    """

    step_rule: Any = "backtracking"
    order: str = FULL
    blocks_per_step: int = 1
    seed: int = 0
    source: ClassVar[str] = "Lacoste-Julien et al. (2013), algorithm 3; Osokin et al. (2016)"

    def __post_init__(self) -> None:
        object.__setattr__(self, "step_rule", make_step_rule(self.step_rule))
        check_choice(self, "order", (FULL, CYCLIC, RANDOM, GAP))
        check_number(self, "blocks_per_step", 1, math.inf, closed="left", integer=True)
        check_number(self, "seed", 0, math.inf, closed="left", integer=True)
        if self.order == FULL and self.blocks_per_step != 1:
            raise OptionError(
                "The 'blocks_per_step' parameter of BlockFrankWolfe says how many blocks an iteration moves, and order "
                f"'full' moves all. Got {self.blocks_per_step!r}; choose order 'cyclic', 'random' or 'gap' with it."
            )

    @property
    def may_rest(self) -> bool:  # type: ignore[override]
        """The blocks of one iteration may have nothing to gain while others do."""
        return self.order != FULL

    def check(self, problem: MatrixProblem) -> None:
        """Refuse domains without an oracle."""
        require_oracle(problem)

    def step(self, problem: MatrixProblem, state: State, evaluation: Evaluation, clock: Clock) -> Step:
        """Choose the blocks, and move each of them toward its vertex."""
        point, scores, domain = state.coefficients, evaluation.scores, problem.domain
        cells = domain.cells(problem.rows)
        direction = domain.minimizer(scores) - point
        slopes = np.bincount(cells, np.sum(direction * scores, axis=1))
        chosen = self.pick(-slopes, clock.iteration)
        memory = dict(state.memory)
        passes = clock.iteration * (1.0 if self.order == FULL else len(chosen) / len(slopes))
        rule: StepRule = self.step_rule
        if isinstance(rule, Backtracking):
            reached, steps = self.descend(rule, problem, evaluation, point, direction, cells, chosen, memory)
        elif SEARCH not in rule.traits:
            norms = np.bincount(cells, np.sum(direction**2, axis=1))
            steps = np.zeros(len(slopes))
            for cell in chosen[norms[chosen] > 0]:
                ends = Search(passes, evaluation.value, slopes[cell], norms[cell], 1.0, lambda _: math.nan)
                steps[cell] = rule(ends, memory)
            reached = point + steps[cells, None] * direction
        else:
            reached, steps = self.search(problem, evaluation, point, direction, cells, chosen, passes, memory)
        vertices = domain.vertices(scores)[:, np.isin(cells, chosen)] if domain.has_vertices else None
        extra = {"kind": "toward", "blocks": int(np.count_nonzero(steps))}
        return Step(State(reached, memory), float(steps[chosen].mean()), vertices, extra=extra)

    def pick(self, gaps: Array, iteration: int) -> Array:
        """Return the blocks that move [m], from their gaps."""
        blocks = len(gaps)
        count = min(self.blocks_per_step, blocks)
        if self.order == FULL:
            return np.arange(blocks)
        if self.order == CYCLIC:
            return (iteration * count + np.arange(count)) % blocks
        rng = np.random.default_rng([self.seed, iteration])
        if self.order == RANDOM or not (gaps > 0).any():
            return rng.permutation(blocks)[:count]
        gaining = np.maximum(gaps, 0.0)
        return rng.choice(blocks, min(count, int(np.count_nonzero(gaining))), replace=False, p=gaining / gaining.sum())

    def descend(
        self,
        rule: Backtracking,
        problem: MatrixProblem,
        evaluation: Evaluation,
        point: Array,
        direction: Array,
        cells: Array,
        chosen: Array,
        memory: Memory,
    ) -> tuple[Array, Array]:
        """Return the next point and the steps [blocks], all found at once."""
        moving = np.isin(cells, chosen)[:, None] * direction
        slopes = np.bincount(cells, np.sum(moving * evaluation.scores, axis=1))
        norms = np.bincount(cells, np.sum(moving**2, axis=1))
        lines: dict[int, Line] = {}

        def along(steps: Array) -> float:
            lines.clear()  # a line holds models: only the last one is kept
            lines[0] = problem.line(point, steps[cells, None] * moving)
            return lines[0].value(1.0)

        slack = problem.resolution * abs(evaluation.value)
        steps = rule.jointly(slopes, norms, evaluation.value, along, slack, memory)
        reached = point + steps[cells, None] * moving
        if steps.any():
            lines[0].accept(1.0, reached)
        return reached, steps

    def search(
        self,
        problem: MatrixProblem,
        evaluation: Evaluation,
        point: Array,
        direction: Array,
        cells: Array,
        chosen: Array,
        passes: float,
        memory: Memory,
    ) -> tuple[Array, Array]:
        """Return the next point and the steps [blocks], found one after the other."""
        rule: StepRule = self.step_rule
        steps = np.zeros(int(cells.max()) + 1)
        moved = False
        for cell in chosen:
            along = (cells == cell)[:, None] * direction
            if not np.any(along):
                continue
            line = problem.line(point, along)
            search = Search(
                passes,
                line.value(0.0) if moved else evaluation.value,
                line.slope(0.0) if moved else float(np.sum(along * evaluation.scores)),
                float(np.sum(along**2)),
                1.0,
                line.value,
                problem.resolution,
                line.slope,
                problem.quadratic,
            )
            if not search.slope < 0:
                continue  # the blocks before have taken what there was to gain
            steps[cell] = rule(search, memory)
            if steps[cell] > 0:
                point = point + steps[cell] * along
                line.accept(steps[cell], point)
                moved = True
        return point, steps
