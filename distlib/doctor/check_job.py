"""Facts of all ranks in, problems out: what differs, who shares no memory, what the self-test found. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from distlib.doctor.check_gpus import cards_shared
from distlib.doctor.checks import check, split_fix
from distlib.doctor.facts import Facts, Node, Problem, SelfTest, error, warning
from distlib.words import plural, ranks_text


def check_job(facts: list[Facts], nodes: list[Node]) -> list[Problem]:
    """Problems of a job (facts by rank): each host's own, told once; then what concerns several."""
    hosts: dict[str, list[int]] = {}  # ranks by host: pretend nodes share one
    for node in nodes:
        hosts.setdefault(node.host, []).extend(node.ranks)
    found: dict[str, tuple[Problem, list[str]]] = {}
    for host, ranks in hosts.items():
        here = [facts[rank] for rank in ranks]
        for problem in [*check(here[0]), *_crowds(here), *cards_shared(here)]:
            found.setdefault(problem.model_dump_json(), (problem, []))[1].append(host)
    own = [
        problem.model_copy(update={"hosts": where if len(where) < len(hosts) else []})
        for problem, where in found.values()
    ]
    return [*own, *_differences(facts), *_strangers(facts, nodes)]


def _crowds(facts: list[Facts]) -> Iterator[Problem]:
    """Ranks and threads of one host beside its cores. Each rank may be bound to some of them."""
    ranks = len(facts)
    cores = len({core for f in facts for core in f.machine.affinity})
    threads = sum(f.launched.threads for f in facts)
    if ranks > cores:
        yield warning(
            "cores",
            what=f"{ranks} ranks share {plural(cores, 'core')}",
            why="They take turns: a step takes as long as all of them one after the other.",
            fix=f"Start at most {plural(cores, 'rank')} a host, or allow more cores (mpirun --bind-to none).",
        )
    elif threads > max(cores, ranks):
        yield warning(
            "cores",
            what=f"{ranks} ranks with {threads} threads in all, on {plural(cores, 'core')}",
            why="Threads of different ranks push each other off the cores; steps become much slower.",
            fix=f"Set OMP_NUM_THREADS={max(1, cores // ranks)} (under mpirun with -x).",
        )


_TOPICS = {
    "distlib": "distlib",
    "torch": "torch",
    "Python": "distlib",
    "NCCL": "torch",
    "NVIDIA driver": "gpu",
    "libfabric": "fabric",
    "aws-ofi-nccl": "fabric",
}


def _differences(facts: list[Facts]) -> Iterator[Problem]:
    """What must be alike on all ranks, and is not."""
    versions: dict[str, list[str | None]] = {
        "distlib": [f.versions.distlib for f in facts],
        "torch": [f.versions.torch for f in facts],
        "Python": [f.versions.python for f in facts],
        "NCCL": [f.versions.nccl_loaded or f.versions.nccl for f in facts],
        "NVIDIA driver": [f.gpus.driver or None for f in facts],
        "libfabric": [f.fabric.libfabric for f in facts],
        "aws-ofi-nccl": [max(f.fabric.plugins.values(), default="") or None for f in facts],
    }
    for name, values in versions.items():
        if len(set(values)) > 1:
            tell = error if name in ("distlib", "torch", "NCCL") else warning
            yield tell(
                _TOPICS[name],
                what=f"{name} differs: {_sides(values)}",
                why="Versions may lay out memory, messages and checkpoints differently.",
                fix="Install the same on every host: one image, or one lock file.",
            )
    for name in sorted({name for f in facts for name in f.settings}):
        settings = [f.settings.get(name) for f in facts]
        if len(set(settings)) > 1:
            yield warning(
                "settings",
                what=f"{name} differs: {_sides(settings)}",
                why="Ranks that behave differently fail late, or hang.",
                fix="Export it on every host (torchrun hands it on; mpirun -x NAME; srun --export=ALL).",
            )


def _sides(values: list[str | None]) -> str:
    """ "a on ranks 0-3, none on rank 4"."""
    return ", ".join(
        f"{value or 'none'} on {ranks_text(rank for rank, v in enumerate(values) if v == value)}"
        for value in dict.fromkeys(values)
    )


def _strangers(facts: list[Facts], nodes: list[Node]) -> Iterator[Problem]:
    """Ranks that name one host, yet share no memory."""
    by_host: dict[str, list[Node]] = {}
    for node in nodes:
        by_host.setdefault(node.host, []).append(node)
    apart = [(host, together) for host, together in by_host.items() if len(together) > 1]
    is_meant = "DISTLIB_NODES" in facts[0].settings or not all(f.build.core_works for f in facts)
    if apart and not is_meant:
        host, together = apart[0]
        yield warning(
            "job",
            what=f"all on {host}, but sharing no memory: " + "; ".join(ranks_text(node.ranks) for node in together),
            why="They communicate over TCP, as between hosts.",
            fix="Start all ranks of a host in one container, as one user. If these are different hosts, "
            "give each a name of its own.",
        )


def check_selftest(result: SelfTest) -> Iterator[Problem]:
    """A self-test that failed, or computed something else than expected."""
    if result.error:
        what, fix = split_fix(result.error)
        yield error(
            "self-test",
            what=what,
            why=f"{plural(result.ranks, 'rank')} could not do what every job does.",
            fix=fix or "See the other problems first; then run again with TORCH_DISTRIBUTED_DEBUG=DETAIL.",
        )
    if result.wrong:
        yield error(
            "self-test",
            what=f"wrong results: {', '.join(result.wrong)}",
            why="Training on these ranks would go wrong without a message.",
            fix="Please report it with the output of `distlib doctor --json`. DISTLIB_CORE=0 avoids it.",
        )
