"""The ``sidetask`` command."""

from __future__ import annotations

import functools
import inspect
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from sidetask_core import StepFailure, parallel, plugins

from sidetask_bench import document, tables
from sidetask_bench.assemble import make_dataset
from sidetask_bench.compare import compare as run_comparison
from sidetask_bench.config import Experiment, Plugin, load_experiment
from sidetask_bench.label import label as write_labels
from sidetask_bench.prepare import prepare as decode
from sidetask_bench.progress import ConsoleDisplay, Display
from sidetask_bench.run import train as run_training
from sidetask_bench.runtime import cores, processes
from sidetask_bench.schema import ExperimentError, plain
from sidetask_bench.workers import Running

app = typer.Typer(
    help="Train and compare multi-task and auxiliary-learning methods.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Source = Annotated[str, typer.Argument(metavar="EXPERIMENT", help="A YAML file, or the name of a preset.")]
Assignments = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY.PATH=VALUE", help="Override a value; may be repeated.")
]
Runs = Annotated[Path, typer.Option("--runs", help="Where experiments get their folders.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Start again, whatever the folder holds.")]
Jobs = Annotated[int, typer.Option("--jobs", "-j", help="Runs at a time, each in its own process.", min=1)]
Ray = Annotated[
    str | None,
    typer.Option(metavar="ADDRESS", help="Run on a Ray cluster: auto for this machine's, local for a new one."),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def _reported(command: Callable[..., None]) -> Callable[..., None]:
    """Say what is wrong in one line: exit status 2 for bad input or a bad place, 1 for a run that failed."""

    @functools.wraps(command)
    def wrapped(*args: Any, debug: bool = False, **kwargs: Any) -> None:
        try:
            with processes():
                command(*args, **kwargs)
        except (ExperimentError, StepFailure) as error:
            if debug:
                raise
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2 if isinstance(error, ExperimentError) else 1) from error
        except BrokenPipeError:  # who read has read enough
            raise
        except OSError as error:
            if debug:
                raise
            typer.echo(f"error: {error if error.filename is None else f'{error.filename}: {error.strerror}'}", err=True)
            raise typer.Exit(2) from error
        except KeyboardInterrupt as error:
            typer.echo("interrupted; the same command goes on from the last checkpoint", err=True)
            raise typer.Exit(130) from error

    # Typer reads options from the signature: the command's own, resolved, and --debug.
    signature = inspect.signature(command, eval_str=True)
    flag = inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Debug)
    parameters = [*signature.parameters.values(), flag]
    wrapped.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return wrapped


@app.command()
@_reported
def train(
    experiment: Source,
    assignments: Assignments = None,
    seed: Annotated[int | None, typer.Option(help="Instead of the experiment's first.", min=0)] = None,
    row: Annotated[str | None, typer.Option(help="Train a row of the experiment instead of its base.")] = None,
    folder: Annotated[Path | None, typer.Option(help="The run's folder.")] = None,
    runs: Runs = Path("runs"),
    overwrite: Overwrite = False,
) -> None:
    """Train one run; go on with it if it was interrupted."""
    loaded = _in_runs(experiment, assignments, runs)
    config = loaded.run(row, loaded.seeds[0] if seed is None else seed)
    folder = folder or runs / config.experiment / config.row / f"seed{config.seed}"
    console = _console()
    result = run_training(config, folder, overwrite=overwrite, display=_display(console))
    if parallel.rank() == 0:
        table = Table("task", "metric", "test")
        for task, metrics in result["test"].items():
            for metric, value in metrics.items():
                table.add_row(task, metric, tables.number(value, tables.decimals([value])))
        console.print(table)
        console.print(f"run: {folder}", soft_wrap=True, markup=False, highlight=False)


@app.command()
@_reported
def compare(
    experiment: Source,
    assignments: Assignments = None,
    folder: Annotated[Path | None, typer.Option(help="The comparison's folder.")] = None,
    runs: Runs = Path("runs"),
    jobs: Jobs = 1,
    ray: Ray = None,
    overwrite: Overwrite = False,
) -> None:
    """Train every row with every seed, and write table and report; finished runs are kept.

    Relations and labels that its rows read from its own folder are made first.
    """
    loaded = load_experiment(experiment, assignments or ())
    words = ["sidetask", "compare", experiment, *(word for each in assignments or () for word in ("--set", each))]
    console = _console()
    how = _running(console, jobs, ray, overwrite)
    if _compare(loaded, folder or runs / loaded.name, shlex.join(words), console, how):
        raise typer.Exit(1)


@app.command("table")
@_reported
def paper_table(
    experiment: Source,
    assignments: Assignments = None,
    small: Annotated[bool, typer.Option("--small", help="Run EXPERIMENT-small, which takes minutes.")] = False,
    runs: Runs = Path("runs"),
    jobs: Jobs = 1,
    ray: Ray = None,
    overwrite: Overwrite = False,
) -> None:
    """Run a paper's table, or go on with it, and print it beside the paper's figures, each size in its own columns.

    --set is for the size that is run. The other's columns show what there is of it, as it was run.
    """
    from sidetask_bench import papers

    sizes = papers.sizes(experiment, assignments or (), small=small)
    folder = runs / sizes.chosen.name
    words = ["sidetask", "table", experiment, *(word for each in assignments or () for word in ("--set", each))]
    command = shlex.join([*words, "--small"] if small else words)
    console = _console()
    failed = _compare(sizes.chosen, folder, command, console, _running(console, jobs, ray, overwrite))
    if parallel.rank() == 0:
        table = papers.Table.of(sizes, runs)
        console.print(table.terminal())
        path = folder / "paper.md"
        table.write(path)
        console.print(f"table: {path}", soft_wrap=True, markup=False, highlight=False)
    if failed:
        raise typer.Exit(1)


@app.command()
@_reported
def demo(
    runs: Runs = Path("runs"),
    jobs: Annotated[
        int | None, typer.Option("--jobs", "-j", help="Runs at a time; one for each core if not given.", min=1)
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Compare five methods on two made-up data sets; some minutes on two CPU cores."""
    failed = False
    # A run of the demo is on one thread, so that its numbers are the same on every machine of a kind.
    for name in ("digits", "scenes"):
        console = _console()
        how = _running(console, jobs or cores(), None, overwrite)
        failed |= _compare(load_experiment(name), runs / name, f"sidetask compare {name}", console, how)
    if failed:
        raise typer.Exit(1)


@app.command("prepare")
@_reported
def prepare_dataset(
    dataset: Annotated[str, typer.Argument(help="The name of a data set that is read from files.")],
    root: Annotated[Path, typer.Argument(help="Where its files are.")],
    options: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Its options.")] = None,
    jobs: Annotated[
        int | None, typer.Option("--jobs", "-j", help="Processes that decode; threads of one if not given.", min=1)
    ] = None,
    cache: Annotated[Path | None, typer.Option(help="Where caches are kept; else SIDETASK_CACHE or ~/.cache.")] = None,
) -> None:
    """Check the files of a data set, every one of them, and decode them for all trainings to come."""
    from sidetask_datasets import DataErrors  # here, because what it imports is slow to

    given = document.override({}, options or ())
    try:
        found = decode(dataset, root, given, jobs=jobs, cache=cache)
    except DataErrors as error:
        for problem in error.problems:
            typer.echo(f"error: {problem}", err=True)
        typer.echo(f"{len(error.problems)} problems; nothing is kept that is not whole", err=True)
        raise typer.Exit(1) from error
    console = _console()
    table = Table("split", "samples", *found.bytes, "bytes per sample")
    for split, count in found.samples.items():
        table.add_row(split, str(count), *map(str, found.bytes.values()), str(sum(found.bytes.values())))
    console.print(table)
    console.print(f"cache: {found.folder}", soft_wrap=True, markup=False, highlight=False)


@app.command("describe")
@_reported
def describe_dataset(
    dataset: Annotated[str, typer.Argument(help="The name of a data set.")],
    options: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Its options.")] = None,
    gallery: Annotated[Path | None, typer.Option(help="A PNG that gets samples of every split.")] = None,
    samples: Annotated[int, typer.Option(help="So many of each split.", min=1)] = 3,
) -> None:
    """Count the samples and labels of a data set, and draw some: to be looked at before it is believed."""
    # Here, because what it imports is slow to.
    from PIL import Image
    from sidetask_datasets import describe, sheet

    from sidetask_bench import storage

    data = make_dataset(Plugin(dataset, document.override({}, options or ())))
    found = describe(data)
    console = _console()
    splits = {name: getattr(data, name) for name in ("train", "validation", "test")}
    rows: list[list[str] | None] = [["samples", *(str(len(split)) for split in splits.values())]]
    for task, labels in found.items():
        rows.append(None)
        numbers = data.views[task].kind in ("scalar", "normals", "vector")
        for value in labels["train"]:
            form = "{:.4g}" if numbers and value != "unlabelled" else "{:.2%}"
            rows.append([f"{task}: {value}", *(form.format(labels[split][value]) for split in splits)])
    console.print(tables.Blocks(["", *splits], rows))
    if gallery is not None:
        picture = Image.fromarray(sheet(data, samples))
        storage.write_atomically(gallery, lambda file: picture.save(file, format="PNG"))
        console.print(f"gallery: {gallery}", soft_wrap=True, markup=False, highlight=False)


@app.command("label")
@_reported
def label_images(
    run: Annotated[Path, typer.Argument(help="The folder of the run that labels.")],
    folder: Annotated[Path, typer.Argument(help="Gets the labels of each split.")],
    task: Annotated[str, typer.Option(help="Whose class probabilities are the labels.")],
    of: Annotated[str | None, typer.Option(help="Label the images of this experiment, not the run's own.")] = None,
    assignments: Assignments = None,
    domain: Annotated[str | None, typer.Option(help="Whose images, where tasks have inputs of their own.")] = None,
    kind: Annotated[str, typer.Option(help="segmentation, soft or tokens.")] = "segmentation",
    threshold: Annotated[float, typer.Option(help="Pixels with no higher probability stay unlabelled.")] = 0.5,
    patch: Annotated[int, typer.Option(help="Side of a token's patch in pixels.", min=1)] = 8,
) -> None:
    """Label images with a trained run, for pseudo tasks; splits that are labelled are kept."""
    images = None if of is None else load_experiment(of, assignments or ()).dataset
    write_labels(run, folder, task=task, of=images, domain=domain, kind=kind, threshold=threshold, patch=patch)
    _console().print(f"labels: {folder}", soft_wrap=True, markup=False, highlight=False)


@app.command()
@_reported
def relations(
    experiment: Source,
    assignments: Assignments = None,
    seed: Annotated[int | None, typer.Option(help="Instead of the experiment's first.", min=0)] = None,
    folder: Annotated[Path | None, typer.Option(help="The folder of all trainings.")] = None,
    runs: Runs = Path("runs"),
    jobs: Jobs = 1,
    ray: Ray = None,
    overwrite: Overwrite = False,
    estimates: Annotated[bool, typer.Option("--estimates", help="Set cheaper estimates beside it.")] = False,
    ablate: Annotated[bool, typer.Option("--ablate", help="Switch each connection of a row off instead.")] = False,
    row: Annotated[str | None, typer.Option(help="With --ablate: which row; the base if not given.")] = None,
) -> None:
    """Train every task alone and every pair, and say which task helps which, for SAAL; finished runs are kept.

    With --ablate, train a row of a method with transfers, once for each of them without it.
    """
    # Here, because matplotlib is slow to import.
    from sidetask_bench.ablation import ablate_transfers
    from sidetask_bench.estimates import estimate_relations
    from sidetask_bench.relations import enumerate_relations

    if ablate and estimates:
        raise ExperimentError("--ablate and --estimates are two commands; give one of them")
    if row is not None and not ablate:
        raise ExperimentError("--row goes with --ablate")
    loaded = _in_runs(experiment, assignments, runs)
    console = _console()
    how = _running(console, jobs, ray, overwrite)
    if ablate:
        folder = folder or runs / loaded.name / f"ablation-{row or 'base'}"
        effects = ablate_transfers(loaded, folder, row=row, seed=seed, **how)
        console.print(_matrix("source, its connection gives %", effects.tasks, effects.effect))
        _leave_out(effects.failed)
        return
    folder = folder or runs / loaded.name / "relations"
    estimated = estimate_relations(loaded, folder, seed=seed, **how) if estimates else None
    found = enumerate_relations(loaded, folder, seed=seed, **how) if estimated is None else estimated.truth
    console.print(_matrix("source, improves by %", found.tasks, found.improvement))
    if estimated is not None:
        rows = []
        for name, ranks in estimated.correlations.items():
            known = ranks[np.isfinite(ranks)]
            shown = [*ranks.tolist(), float(known.mean()) if len(known) else float("nan")]
            rows.append([name, *["–" if value != value else f"{value:+.2f}" for value in shown]])
        console.print(tables.Blocks(["Spearman's rank correlation with it", *found.tasks, "mean"], rows))
    path = folder / "relations.json"
    console.print(f"method: {{name: saal-e, relations: {path}}}", soft_wrap=True, markup=False, highlight=False)
    _leave_out(found.failed if estimated is None else estimated.failed)


@app.command()
@_reported
def grouping(
    experiment: Source,
    assignments: Assignments = None,
    row: Annotated[
        list[str] | None, typer.Option(help="A row to set beside them; may be repeated. Default: all.")
    ] = None,
    folder: Annotated[Path | None, typer.Option(help="The folder of all trainings.")] = None,
    runs: Runs = Path("runs"),
    jobs: Jobs = 1,
    ray: Ray = None,
    overwrite: Overwrite = False,
) -> None:
    """Train every combination of tasks with equal weights, beside rows that learn weights; finished runs are kept."""
    from sidetask_bench.grouping import compare_groupings  # here, because matplotlib is slow to import

    loaded = _in_runs(experiment, assignments, runs)
    console = _console()
    folder = folder or runs / loaded.name / "grouping"
    found = compare_groupings(loaded, folder, rows=row, **_running(console, jobs, ray, overwrite))
    shown = []
    for entry in found.entries:
        cells = []
        for task in found.tasks:
            change = entry.improvement.get(task, {"mean": None, "std": None})
            value = tables.with_deviation(change["mean"], change["std"], tables.IMPROVEMENT_PLACES, sign=True)
            cells.append(f"{value} *" if found.best.get(task) == entry.name else value)
        shown.append([entry.name, *cells])
    console.print(tables.Blocks(["improves on the task alone by %", *found.tasks], shown))
    console.print("* the combination that is best for the task on the validation split")
    console.print(f"grouping: {folder / 'grouping.png'}", soft_wrap=True, markup=False, highlight=False)
    _leave_out(found.failed)


def _matrix(title: str, tasks: Sequence[str], values: Any) -> tables.Blocks:
    rows = [
        [source, *["" if value != value else f"{value:+.2f}" for value in row]]
        for source, row in zip(tasks, values.tolist(), strict=True)
    ]
    return tables.Blocks([title, *tasks], rows)


def _leave_out(failed: Mapping[str, str]) -> None:
    for names, error in failed.items():
        typer.echo(f"left out: {names}: {error}", err=True)
    if failed:
        raise typer.Exit(1)


@app.command("control")
@_reported
def control_weights(
    experiment: Source,
    row: Annotated[str, typer.Option(help="Whose weights learn.")],
    of: Annotated[str, typer.Option(help="Whose trained networks stand still under them.")],
    assignments: Assignments = None,
    folder: Annotated[Path | None, typer.Option(help="The comparison's folder.")] = None,
    runs: Runs = Path("runs"),
) -> None:
    """Let a row's weights learn where they cannot matter, on networks that do not change: what is left is chance."""
    from sidetask_bench.control import control, table

    loaded = load_experiment(experiment, assignments or ())
    folder = folder or runs / loaded.name
    console = _console()
    console.print(table(control(loaded, folder, row=row, of=of)))
    console.print(f"weights: {folder / f'control-{row}.json'}", soft_wrap=True, markup=False, highlight=False)


@app.command("watch")
@_reported
def watch_runs(
    folder: Annotated[Path, typer.Argument(help="Of a run, or of several.")],
    tensorboard: Annotated[
        Path | None, typer.Option(help="Write TensorBoard scalars of what there is and of what comes into this folder.")
    ] = None,
) -> None:
    """Follow runs that another process trains, until none goes on."""
    from sidetask_bench.watch import watch

    stopped = watch(folder, ConsoleDisplay(_console()), tensorboard=tensorboard)
    for name in stopped:
        typer.echo(f"{name} has stopped without a result; the command that began it goes on with it", err=True)
    if stopped:
        raise typer.Exit(1)


@app.command("report")
@_reported
def rewrite_report(folder: Annotated[Path, typer.Argument(help="Of a comparison.")]) -> None:
    """Write the report of a comparison again."""
    _say_report(folder, _console())


@app.command("show")
@_reported
def show_experiment(experiment: Source, assignments: Assignments = None) -> None:
    """Print an experiment whole, with what it extends, the overrides, and the defaults."""
    typer.echo(document.dump(plain(load_experiment(experiment, assignments or ()))), nl=False)


@app.command("list")
@_reported
def list_installed() -> None:
    """What is installed: methods, data sets and networks with their distributions, and the presets."""
    console = _console()
    for group, title in (("methods", "methods"), ("datasets", "data sets"), ("networks", "networks")):
        table = Table(title, "distribution")
        for name, distribution in plugins.installed(group).items():
            table.add_row(name, distribution)
        console.print(table)
    table = Table("presets", "data set", "rows")
    for name in document.presets():
        loaded = load_experiment(name)
        table.add_row(name, loaded.dataset.name, ", ".join(loaded.rows))
    console.print(table)


def _in_runs(source: str, assignments: Sequence[str] | None, runs: Path) -> Experiment:
    """An experiment whose own folder is there."""
    experiment = load_experiment(source, assignments or ())
    return experiment.at(runs / experiment.name)


def _running(console: Console, jobs: int, ray: str | None, overwrite: bool = False) -> Running:
    how: Running = {"jobs": jobs, "overwrite": overwrite, "display": _display(console)}
    if ray is not None:
        from sidetask_bench.cluster import Cluster

        how["pool"] = functools.partial(Cluster, address=ray)
    return how


def _compare(experiment: Experiment, folder: Path, command: str, console: Console, how: Running) -> bool:
    comparison = run_comparison(experiment, folder, command=command, **how)
    if parallel.rank():
        return False
    console.print(tables.terminal(comparison))
    for failure in tables.left_out(comparison):
        typer.echo(failure, err=True)
    for sentence in tables.mixed_versions(comparison["mixed_versions"]):
        typer.echo(sentence, err=True)
    _say_report(folder, console)
    return bool(comparison["failed"])


def _say_report(folder: Path, console: Console) -> None:
    from sidetask_bench import report  # here, because matplotlib is slow to import

    path = report.write(folder)
    console.print(f"report: {path}\n", soft_wrap=True, markup=False, highlight=False)


def _console() -> Console:
    """Outside a terminal there is no width to keep to, and the fewer blocks a table is in, the better."""
    console = Console()
    return console if console.is_terminal else Console(width=max(console.width, 160))


def _display(console: Console) -> Display:
    return ConsoleDisplay(console) if parallel.rank() == 0 else Display()
