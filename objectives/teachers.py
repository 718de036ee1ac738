"""Teachers: the weights, a task, whose predictions or features the merged model is to have."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from .errors import DataError, nearest, some
from .models import Weights

Teacher = Weights | Callable[[], Weights]


def checked_teachers(
    teachers: Mapping[str, Teacher], tasks: Sequence[str], owner: str
) -> dict[str, Callable[[], Weights]]:
    """A function that returns the weights of each task's teacher; DataError where a task has none."""
    missing = [name for name in tasks if name not in teachers]
    if missing:
        raise DataError(
            f"{owner}: no teacher for task {some(missing)};{nearest(missing[0], teachers)} "
            f"Give teachers={{task name: weights, or a callable that returns them}}."
        )
    return {name: _callable(teachers[name]) for name in tasks}


def _callable(teacher: Teacher) -> Callable[[], Weights]:
    if callable(teacher):
        return teacher
    weights = teacher
    return lambda: weights
