"""`mergesolve federate`: rounds of a federation in this process, or a study of many server steps."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import yaml

from .flags import json_flag, named_options
from .names import UsageProblem, choose

if TYPE_CHECKING:
    from .protocol import FederationRecipe

RECIPE = "federation.yaml"
FIGURES = "figures"


@click.command(short_help="Rounds of a federation: clients train, the server merges.")
@click.argument("recipe_file", required=False, metavar="[RECIPE.yaml]")
@click.option("--protocol", metavar="NAME", help="continual-clip (9 tasks of the zoo) or label-skew (one task).")
@click.option("--step", metavar="NAME[:KEY=VALUE,...]", help="The server step (see `list steps`; default fedavg).")
@click.option(
    "--client",
    "clients",
    multiple=True,
    metavar="NAME",
    help="Only these tasks of the zoo, or clients of the recipe. Repeatable.",
)
@click.option("--rounds", type=int, metavar="T", help="How many rounds.")
@click.option("--images", type=int, metavar="N", help="Training samples a client.")
@click.option("--server-images", type=int, metavar="N", help="The server's samples for each client's task; 0 for none.")
@click.option("--labels/--no-labels", default=None, help="Whether the server's samples have labels (default: not).")
@click.option("--reference", type=int, metavar="N", help="The server's reference images a concept; 0 for none.")
@click.option(
    "--fault",
    "faults",
    multiple=True,
    metavar="CLIENT=KIND[@ROUND,...]",
    help="Rehearse a fault: nonfinite, shape, missing, huge, stale, late, dropout, crash. Repeatable.",
)
@click.option("--seed", type=int, metavar="N", help="Decides every random choice.")
@click.option(
    "--set", "sets", multiple=True, metavar="KEY=VALUE", help="Any field, such as training.lr=1e-4. Repeatable."
)
@click.option("--run", "folder", metavar="FOLDER", help="Where the run goes (default: runs/federate-STEP).")
@click.option("--resume", metavar="FOLDER", help="Go on with a run; --rounds may be larger than before.")
@click.option("--study", is_flag=True, help="All server steps of the study, over several seeds.")
@click.option("--seeds", type=int, default=3, show_default=True, metavar="N", help="Seeds of the study.")
@click.option("--only", multiple=True, metavar="NAME", help="Only these steps of the study. Repeatable.")
@click.option(
    "--workers", type=int, default=1, show_default=True, metavar="N", help="Clients, or runs of a study, at once."
)
@click.option("--figures/--no-figures", default=True, help="Draw the run.")
@json_flag
def command(
    recipe_file: str | None,
    folder: str | None,
    resume: str | None,
    study: bool,
    seeds: int,
    only: tuple[str, ...],
    workers: int,
    figures: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Let clients fine-tune one model, merge what they send, and repeat; the server step is any merge or solver.

    Each round prints the mean accuracy over the clients' tasks and that on the reference set, which nobody trains on:
    what was learned, and what was forgotten. The run folder holds the recipe, a record a round (rounds.jsonl), the
    state from which a killed server goes on (--resume), the model and figures. Updates of clients are kept in the
    cache folder, so that steps that are compared do not train their first round twice.

    \b
    Examples:
      mergesolve federate --protocol continual-clip --step fedavg
      mergesolve federate --step rows-bound --set step.retention.bound=0.05
      mergesolve federate --step ties:density=0.2 --fault digits=nonfinite@2
      mergesolve federate --resume runs/federate-fedavg --rounds 20
      mergesolve federate --study --workers 2 --run runs/study
      mergesolve federate my-federation.yaml
    """
    from .console import note, print_json

    recipe = read_recipe(recipe_file, resume, flags)
    if workers < 1:
        raise UsageProblem(f"--workers must be at least 1; found {workers}.")
    if study:
        from .study import run_study

        if resume is not None:
            raise UsageProblem("--resume is for one run; a study goes on by itself when its folder is named again.")
        if flags["step"] is not None:
            raise UsageProblem("--step is for one run; --only chooses steps of a --study.")
        place = _folder(folder or "runs/study")
        found = run_study(recipe, place, seeds, only, workers, quiet=as_json, figures=figures)
        if as_json:
            print_json(found)
        return
    if resume is not None and folder is not None:
        raise UsageProblem("--resume goes on in the folder of the run; leave --run out.")
    if only:
        raise UsageProblem("--only chooses steps of a --study.")
    place = Path(resume) if resume is not None else _new_folder(recipe, folder)
    outcome = run_one(recipe, place, resume=resume is not None, workers=workers, quiet=as_json)
    drawn = draw(place) if figures and outcome["records"] else []
    if as_json:
        print_json({**outcome, "folder": str(place), "figures": [str(path) for path in drawn]})
    else:
        note(f"{place}: {outcome['status']}" + (f"; figures in {place / FIGURES}" if drawn else ""))
    if outcome["status"] == "stopped":
        from .errors import SolveFailed

        raise SolveFailed(f"the federation stopped: {outcome['message']} Go on with --resume {place}.")
    if outcome["status"] == "interrupted":
        from .errors import Interrupted

        raise Interrupted(f"interrupted after round {len(outcome['records'])}; go on with --resume {place}")


def read_recipe(recipe_file: str | None, resume: str | None, flags: Mapping[str, Any]) -> FederationRecipe:
    """The recipe that file and flags make together; of a run that is resumed, the one in its folder."""
    from .protocol import federation_recipe, relative_to
    from .recipe import assign, from_yaml, merge, plain, read_yaml

    fields: dict[str, Any] = {}
    if resume is not None:
        if recipe_file is not None or flags["protocol"] is not None:
            raise UsageProblem("--resume takes the recipe of the run; leave the recipe file and --protocol out.")
        if not (Path(resume) / RECIPE).is_file():
            raise UsageProblem(f"--resume '{resume}': it holds no {RECIPE}, so `mergesolve federate` did not write it.")
        fields = read_yaml(Path(resume) / RECIPE, "recipe")
        begun = federation_recipe(fields, f"'{Path(resume) / RECIPE}'")
    elif recipe_file is not None:
        fields = relative_to(read_yaml(recipe_file, "recipe"), Path(recipe_file).parent.resolve())
    over: dict[str, Any] = {}
    if flags["protocol"] is not None:
        over["protocol"] = flags["protocol"]
    elif not fields.get("protocol") and not fields.get("clients") and not fields.get("partition"):
        over["protocol"] = "continual-clip"
    if flags["step"] is not None:
        over["step"] = named_options(flags["step"], "--step")
    if flags["clients"]:
        over["clients"] = _only(flags["clients"], fields)
    for flag, key in (("rounds", "rounds"), ("seed", "seed")):
        if flags[flag] is not None:
            over[key] = flags[flag]
    for flag, part, key in (
        ("images", "training", "images"),
        ("server_images", "server", "images"),
        ("labels", "server", "labels"),
        ("reference", "server", "reference"),
    ):
        if flags[flag] is not None:
            over.setdefault(part, {})[key] = flags[flag]
    fields = merge(fields, over)
    for pair in flags["sets"]:
        path, separator, text = pair.partition("=")
        if not separator or not path:
            raise UsageProblem(f"--set '{pair}': expected KEY=VALUE, such as training.lr=1e-4.")
        if path.split(".")[0] == "step" and "step" not in fields:
            fields["step"] = {"name": "fedavg"}
        try:
            assign(fields, path, from_yaml(text))
        except yaml.YAMLError:
            raise UsageProblem(f"--set '{pair}': the value is not YAML.") from None
    recipe = with_faults(federation_recipe(fields), flags["faults"])
    if resume is not None:
        old, new = plain(begun), plain(recipe)
        other = [name for name in old if name != "rounds" and old[name] != new[name]]
        if other:
            raise UsageProblem(
                f"--resume '{resume}': the federation was begun with another '{other[0]}', and only --rounds may "
                "change. Leave that out, or begin anew in another folder (--run)."
            )
    return recipe


def _only(names: Sequence[str], fields: Mapping[str, Any]) -> list[Any]:
    """The clients of these names: as the recipe describes them, else tasks of the zoo."""
    clients = fields.get("clients")
    listed = {client["name"]: client for client in clients or () if isinstance(client, dict) and "name" in client}
    if listed and not fields.get("zoo"):
        for name in names:
            choose("client", name, listed, where="--client")
    return [listed.get(name, name) for name in names]


def with_faults(recipe: FederationRecipe, faults: tuple[str, ...]) -> FederationRecipe:
    """The recipe with faults that are rehearsed."""
    from dataclasses import replace

    from .protocol import FaultPart

    clients = {client.name: client for client in recipe.clients}
    for text in faults:
        name, separator, rest = text.partition("=")
        kind, at, rounds = rest.partition("@")
        if not separator or not kind:
            raise UsageProblem(f"--fault '{text}': expected CLIENT=KIND or CLIENT=KIND@ROUND,ROUND.")
        choose("client", name, clients, where="--fault")
        try:
            numbers = tuple(int(number) for number in rounds.split(",")) if at else None
        except ValueError:
            raise UsageProblem(f"--fault '{text}': rounds are numbers, as in {name}={kind}@2,3.") from None
        if numbers is not None and not all(1 <= number <= recipe.rounds for number in numbers):
            raise UsageProblem(f"--fault '{text}': the federation has the rounds 1 to {recipe.rounds}.")
        clients[name] = replace(clients[name], fault=FaultPart(kind, numbers))
    return replace(recipe, clients=tuple(clients.values()))


def run_one(
    recipe: FederationRecipe, folder: Path, *, resume: bool, workers: int = 1, quiet: bool = False, updates: bool = True
) -> dict[str, Any]:
    """Run a federation into a folder; returns its header, records, status and message."""
    from .console import counting, warn
    from .federating import FederationSetup, cache_folder
    from .protocol import to_yaml

    setup = FederationSetup(recipe, cache_folder() if updates else None)
    setup.check()
    federation = setup.federation
    from ..federated import federate
    from ..federated.federation import ROUNDS, STATE, read_rounds
    from ..solvers.files import write_bytes

    if resume and not (folder / STATE).exists() and read_rounds(folder / ROUNDS)[1]:
        raise UsageProblem(
            f"--resume '{folder}': rounds were done, and the state after them, {STATE}, is gone. Put it back, or begin "
            "anew in another folder."
        )
    if not resume:  # before the first round, so that a run that is killed in it can be resumed
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(folder / RECIPE, to_yaml(recipe).encode())

    def tell(record: dict[str, Any]) -> None:
        if not quiet:  # by sys.stderr, in whose place the progress line puts what prints above itself
            print(line_of(record, recipe.rounds), file=sys.stderr, flush=True)

    try:
        with counting("", quiet=quiet) as progress:
            history = federate(
                federation,
                recipe.rounds,
                folder,
                resume=resume,
                workers=workers,
                callback=tell,
                progress=progress,
            )
    except Exception:
        if not resume:
            _discard(folder)
        raise
    write_bytes(folder / RECIPE, to_yaml(recipe).encode())
    lost = sorted({*range(1, history.state.round + 1)} - {record["round"] for record in history.records})
    if lost:
        warn(f"{folder / ROUNDS} has no records of rounds {', '.join(map(str, lost))}, which were done.")
    return {
        "header": history.header,
        "records": history.records,
        "status": history.status,
        "message": history.message,
    }


def _discard(folder: Path) -> None:
    """Remove what a run wrote that failed before its first round was done, so that it can begin anew there."""
    from ..federated.federation import ROUNDS, STAGED, START, STATE, read_rounds

    if not read_rounds(folder / ROUNDS)[1]:
        for name in (RECIPE, ROUNDS, STAGED, START, STATE):
            (folder / name).unlink(missing_ok=True)
        with suppress(OSError):  # it held other files before
            folder.rmdir()


def line_of(record: Mapping[str, Any], rounds: int) -> str:
    """A round in one line."""
    if record["repeat"]:
        text = f"round {record['round']}/{rounds}: too few replies"
    else:
        text = f"round {record['round']}/{rounds}:"
        if record.get("mean") is not None:
            text += f" clients {record['mean']:.1f}%"
        if record.get("reference") is not None:
            text += f"  reference {record['reference']:.1f}%"
        text += f"  step {record['step_length']:.3g}  server {record['seconds']['server']:.1f} s"
        method = record.get("method", {})
        if method.get("bound") is not None:
            text += f"  reference loss {method['reference_loss']:.3g} ≤ {method['bound']:g}"
    for left in record["rejected"]:
        text += f"\n  left out {left['client']}: {left['reason']} ({left['detail']})"
    return text


def draw(folder: Path) -> list[Path]:
    """Draw a run or a study into its folder."""
    from ..reports import read_study, save_federation

    return list(save_federation(read_study(folder), folder / FIGURES))


def _folder(wanted: str) -> Path:
    if Path(wanted).exists() and not Path(wanted).is_dir():
        raise UsageProblem(f"--run '{wanted}' is a file. Name a folder.")
    return Path(wanted)


def _new_folder(recipe: FederationRecipe, wanted: str | None) -> Path:
    if wanted is not None:
        if (_folder(wanted) / "study.json").exists():
            raise UsageProblem(f"--run '{wanted}' holds a study. Go on with it (--study), or name another folder.")
        if (Path(wanted) / "rounds.jsonl").exists():
            raise UsageProblem(
                f"--run '{wanted}' holds a federation already. Go on with it (--resume {wanted}), or name another "
                "folder."
            )
        return Path(wanted)
    for k in range(1, 10_000):
        folder = Path("runs") / (f"federate-{recipe.step.name}" + ("" if k == 1 else f"-{k}"))
        if not folder.exists():
            return folder
    raise UsageProblem("runs/ holds 10000 federations of this step. Give --run FOLDER.")
