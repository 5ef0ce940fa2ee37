"""The shell commands, thin: each parses, calls one function and prints what comes back."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from typing import Annotated

import typer
from rich.console import Console

import distlib

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False, rich_markup_mode=None)
bench = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Measure what this machine or this job can do.")
app.add_typer(bench, name="bench")

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def main() -> None:
    """Entry point of `distlib` and `python -m distlib`."""
    app(prog_name="distlib")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(distlib.__version__)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """distlib: trains PyTorch models on many processes."""


@app.command(short_help="What this machine and this job have, and what is wrong.")
def doctor(
    json: Json = False,
    no_selftest: Annotated[bool, typer.Option("--no-selftest", help="Start and join no ranks.")] = False,
    timeout: Annotated[
        float, typer.Option(min=1, help="Seconds for the self-test's ranks to meet, and for each collective.")
    ] = 30,
) -> None:
    """What this machine and this job have, what is wrong, and what to do about it.

    Alone, it tries out two ranks of its own. Under a launcher it tries out the job's ranks, and rank 0
    reports: torchrun --no-python --nproc-per-node 2 distlib doctor; mpirun -np 2 distlib doctor.

    Exit code: 1 if there is an error, else 0; warnings do not count.
    """
    from distlib.doctor.examine import Absent, examine
    from distlib.doctor.show import show
    from distlib.launchers import launcher_name

    console = Console()
    is_alone = launcher_name() == "single"  # else ranks share the terminal
    try:
        with (
            console.status("Looking around, and trying two ranks out", refresh_per_second=4)
            if is_alone
            else nullcontext()
        ):
            report = examine(not no_selftest, timeout)
    except Absent as absent:
        if absent.__cause__:  # rank 0 may not be there to tell
            print(f"distlib doctor: {absent.__cause__}", file=sys.stderr)
        raise typer.Exit from None  # not 1: launchers would end rank 0 before it has told
    if json:
        print(report.model_dump_json(indent=2))
    else:
        show(report, console)
    raise typer.Exit(report.exit_code)


@bench.command(short_help="Time collectives over sizes.")
def collectives(
    ranks: Annotated[
        int | None, typer.Option(min=2, help="Ranks to start here; only outside a job. Default: 2.")
    ] = None,
    ops: Annotated[
        str,
        typer.Option(
            help="Operations, with commas between: all_reduce, reduce_scatter, all_gather, broadcast, all_to_all, "
            "send_recv. Default: all."
        ),
    ] = "",
    sizes: Annotated[str, typer.Option(help="Sizes of whole tensors, such as 4KiB,1MiB.")] = "",
    ordinary: Annotated[bool, typer.Option("--ordinary", help="Tensors outside the shared memory of distlib.")] = False,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds: without a job for all, else a collective.")] = 120,
    json: Json = False,
) -> None:
    """Time collectives over sizes, on the ranks of this job or on ranks started here."""
    from distlib import bench as benchmark
    from distlib.launchers import detect
    from distlib.words import parse_size

    try:
        chosen = [op.strip() for op in ops.split(",")] if ops else list(benchmark.OPS)
        for op in chosen:
            if op not in benchmark.OPS:
                raise ValueError(f"--ops: there is no {op!r}; there are {', '.join(benchmark.OPS)}")
        lengths = [parse_size(text) for text in sizes.split(",")] if sizes else list(benchmark.SIZES)
        launch = detect()
        if launch.size > 1:
            if ranks is not None:
                raise ValueError(f"--ranks {ranks} is for use outside a job; this one has {launch.size} ranks")
            results = benchmark.run_here(chosen, lengths, not ordinary, "auto", timeout)
        else:
            results = benchmark.run_local(ranks or 2, chosen, lengths, not ordinary, timeout)
    except (ValueError, RuntimeError) as error:
        print(f"distlib bench: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    if launch.rank == 0:
        print(results.model_dump_json(indent=2)) if json else Console().print(benchmark.table(results))
