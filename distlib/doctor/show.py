"""A report for people: one line a topic with a mark, then each problem with the reason and the fix."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator

from rich.console import Console
from rich.text import Text

from distlib.doctor.facts import GIB, Fabric, Facts, Problem, Report, SelfTest
from distlib.doctor.variables import INSTALL_SETTINGS, SETTINGS
from distlib.words import duration, gib, plural, ranks_text, size

_WIDEST = 110
_SIMD = {"avx512": "AVX-512", "avx2": "AVX2", "neon": "NEON", "scalar": "no SIMD"}
_MOST_NODES = 12
_MOST_INTERFACES = 6
_MOST_DEVICES = 8
_MARKS = {"fine": ("✓", "green"), "absent": ("–", "dim"), "warning": ("!", "yellow"), "error": ("✗", "red")}
_PLAIN = str.maketrans({"✓": "+", "✗": "x", "–": "-", "µ": "u"})

Line = tuple[str, str, bool]  # topic, text, whether what it tells of is simply not there


def show(report: Report, console: Console) -> None:
    """Prints the report; in ASCII where the output cannot have the marks."""
    worst: dict[str, str] = {}
    for problem in report.problems:  # errors come first
        worst.setdefault(problem.topic, problem.level)
    for topic, content, is_absent in lines(report):
        mark, style = _MARKS[worst.get(topic) or ("absent" if is_absent else "fine")]
        _print(console, (f" {mark} ", style), (f"{topic:<10}", ""), content, "dim" if is_absent else "")
    console.print()
    for problem in report.problems:
        mark, style = _MARKS[problem.level]
        where = f" ({', '.join(problem.hosts)})" if problem.hosts else ""
        _print(console, (f" {mark} ", style), ("", ""), problem.what + where, "bold")
        _print(console, ("   ", ""), ("why  ", "dim"), problem.why)
        _print(console, ("   ", ""), ("fix  ", "dim"), problem.fix)
        console.print()
    _print(console, (" ", ""), ("", ""), *_verdict(report.problems))


def _print(console: Console, mark: tuple[str, str], label: tuple[str, str], content: str, style: str = "") -> None:
    """`mark` and `label` (text, style) in front of `content`, which is wrapped and stays in its column."""
    indent = len(mark[0]) + len(label[0])
    width = min(console.width, _WIDEST) - indent
    wrapped = [
        piece
        for line in content.splitlines() or [""]
        for piece in textwrap.wrap(line, width, break_long_words=False, break_on_hyphens=False) or [""]
    ]
    text = Text.assemble(mark, label, (f"\n{' ' * indent}".join(wrapped), style))
    if console.options.ascii_only:
        text.plain = text.plain.translate(_PLAIN)
    console.print(text, soft_wrap=True)


def _verdict(problems: list[Problem]) -> tuple[str, str]:
    errors = sum(problem.level == "error" for problem in problems)
    counts = [plural(count, word) for count, word in ((errors, "error"), (len(problems) - errors, "warning")) if count]
    if not counts:
        return "No problems found.", "green"
    return ", ".join(counts), "red" if errors else "yellow"


# ---- the lines ---------------------------------------------------------------------------------------------


def lines(report: Report) -> Iterator[Line]:
    """What there is, a line a topic. Problems name the topic that they belong to."""
    facts = report.facts
    versions, build, gpus = facts.versions, facts.build, facts.gpus.devices
    mpi = [part for part in (versions.mpi4py and f"mpi4py {versions.mpi4py}", versions.mpirun) if part]
    settings = [f"{name}={value} ({_meaning(name)})" for name, value in facts.settings.items()]
    yield "distlib", f"{versions.distlib}, Python {versions.python}, {versions.system}", False
    yield "torch", _torch(facts), False
    yield "core", _core(facts), False
    yield "cuda part", _cuda(facts), not build.cuda_built
    yield "gpu", _gpus(facts), not gpus
    yield "mpi", ", ".join(mpi) or "none (pip install 'distlib-train[mpi]' brings one)", not mpi
    yield "launcher", _launcher(facts), False
    if report.nodes:
        yield "job", _job(report), False
    yield "cores", _cores(facts), False
    yield "memory", _memory(facts), False
    yield "limits", _limits(facts), False
    yield "kernel", _kernel(facts), False
    yield "network", _network(facts), False
    yield "fabric", *_fabric(facts)
    yield "settings", "\n".join(settings) or "no DISTLIB_ variable is set", False
    if report.selftest:
        yield "self-test", _selftest(report.selftest), False
    else:
        yield "self-test", "left out", True


def _first_clause(text: str) -> str:
    """What comes before the details, which a problem tells."""
    return text.splitlines()[0].split(": ")[0] if text else "for no known reason"


def _torch(facts: Facts) -> str:
    versions = facts.versions
    parts = [
        "gloo" if versions.has_gloo else "no gloo",
        f"CUDA {versions.cuda}" if versions.cuda else "no CUDA",
        f"NCCL {versions.nccl}" if versions.nccl else "no NCCL",
    ]
    if versions.nccl and versions.nccl_loaded not in ("", versions.nccl):
        parts[-1] += f" ({versions.nccl_loaded} in use)"
    return f"{versions.torch}: {', '.join(parts)}"


def _core(facts: Facts) -> str:
    build = facts.build
    if build.core_refuses:
        return f"not in use: {_first_clause(build.core_refuses)}"
    if not build.core_works:
        return f"not in use: {_first_clause(build.core_why_not)}"
    compiler = re.sub(r"\s*\(.*?\)", "", build.compiler) or "an unknown compiler"
    return f"shared memory by the C++ core with {_SIMD.get(build.simd, build.simd)}, compiled by {compiler}"


def _cuda(facts: Facts) -> str:
    build = facts.build
    if not build.cuda_built:
        return f"not compiled: {_first_clause(build.cuda_why_not)}"
    if build.cuda_error:
        return f"not in use: {_first_clause(build.cuda_error)}"
    by = re.search(r"cuda_([0-9]+\.[0-9]+)", build.cuda_compiler)
    known = ", ".join(build.cuda_architectures)
    return "compiled" + (f" by CUDA {by[1]}" if by else "") + (f" for {known}" if known else "")


def _gpus(facts: Facts) -> str:
    gpus = facts.gpus
    kinds = [(gpu.name, gib(gpu.memory), gpu.capability) for gpu in gpus.devices]
    counted = [f"{kinds.count(kind)} x {kind[0]} ({kind[1]}, capability {kind[2]})" for kind in dict.fromkeys(kinds)]
    parts = [", ".join(counted) or "none"]
    if gpus.driver:
        serves = f", serves CUDA {gpus.driver_cuda}" if gpus.driver_cuda else ""
        parts.append(f"driver {gpus.driver}{' (open)' if gpus.driver_is_open else ''}{serves}")
    if gpus.links:
        pairs = ", ".join(f"{plural(count, 'pair')} by {kind}" for kind, count in gpus.links.items())
        access = "not all access each other's memory" if gpus.strangers else "all access each other's memory"
        parts.append(f"{pairs}; {access}")
    return "\n".join(parts)


def _launcher(facts: Facts) -> str:
    launched = facts.launched
    if launched.error:
        return f"{launched.launcher}, with variables that do not fit together"
    if launched.launcher == "single":
        return "none, a plain process"
    here = plural(launched.local_size, "rank")
    return f"{launched.launcher}: rank {launched.rank} of {launched.size}, {here} on this host"


def _job(report: Report) -> str:
    ranks = sum(len(node.ranks) for node in report.nodes)
    nodes = [f"{node.host}: {ranks_text(node.ranks)}" for node in report.nodes[:_MOST_NODES]]
    more = [f"and {len(report.nodes) - _MOST_NODES} more"] if len(report.nodes) > _MOST_NODES else []
    pretended = " (pretended: DISTLIB_NODES)" if report.facts.settings.get("DISTLIB_NODES") else ""
    return "\n".join([f"{plural(ranks, 'rank')} on {plural(len(report.nodes), 'node')}{pretended}", *nodes, *more])


def _cores(facts: Facts) -> str:
    machine = facts.machine
    quota = "" if machine.cores_quota is None else f"; the container may use {machine.cores_quota:g}"
    who = f" by rank {facts.launched.rank}" if facts.launched.size > 1 else ""
    return f"{len(machine.affinity)} of {machine.cores} usable{who}{quota}"


def _memory(facts: Facts) -> str:
    machine = facts.machine
    limit = f"container limit {gib(machine.memory_limit)}" if machine.memory_limit else "no container limit"
    available = f"{machine.memory_available / GIB:.1f} of {gib(machine.memory)} available"
    if facts.gpus.devices and machine.shm is not None:
        return f"{available}, {limit}; /dev/shm {gib(machine.shm)}, which NCCL uses"
    return f"{available}, {limit}; /dev/shm is not needed"


def _limits(facts: Facts) -> str:
    limits = facts.limits
    space, locked = (
        "unlimited" if limit is None else gib(limit) for limit in (limits.address_space, limits.locked_memory)
    )
    files = "unlimited" if limits.open_files is None else str(limits.open_files)
    return f"address space {space}, open files {files}, locked memory {locked}"


def _kernel(facts: Facts) -> str:
    tried = {name.replace("_", " "): reason for name, reason in facts.kernel.model_dump().items()}
    return ", ".join(f"{name}: {reason}" if reason else name for name, reason in tried.items())


def _network(facts: Facts) -> str:
    network = facts.network
    names = sorted(network.addresses, key=lambda name: (name == "lo", name))
    known = ", ".join(f"{name} {network.addresses[name]}" for name in names[:_MOST_INTERFACES])
    known += f" and {len(names) - _MOST_INTERFACES} more" if len(names) > _MOST_INTERFACES else ""
    if network.error:
        return known
    if network.chosen:
        return f"{known}\nbetween hosts: {network.chosen} ({network.reason})"
    if network.master is None:
        return f"{known}\nbetween hosts: the one on the way to rank 0's host"
    by_name = network.by_name or "which has no address"
    return f"{known}\nbetween hosts: by this host's name, {by_name} ({network.reason})"


def _fabric(facts: Facts) -> tuple[str, bool]:
    fabric, said = facts.fabric, facts.fabric.said
    devices = [f"{name} ({', '.join([driver, *_state(fabric, name)])})" for name, driver in fabric.devices.items()]
    more = [f"and {len(devices) - _MOST_DEVICES} more"] if len(devices) > _MOST_DEVICES else []
    parts = [*devices[:_MOST_DEVICES], *more] or ["no EFA, no InfiniBand"]
    for path, version in fabric.plugins.items():
        parts.append(f"NCCL plugin {path}" + (f" (aws-ofi-nccl {version})" if version else ""))
    parts += [f"libfabric {fabric.libfabric}"] if fabric.libfabric else []
    ways = [*fabric.gpudirect, *(["gdrcopy"] if fabric.gdrcopy and "gdrdrv" not in fabric.gpudirect else [])]
    parts += [f"GPUDirect by {', '.join(ways)}"] if ways else []
    text = ", ".join(parts)
    if said:
        seen = " (NET/OFI)" if said.has_ofi_line else ""
        direct = ", from the GPUs' own memory" if said.gpudirect else ""
        text += f"\nNCCL used {said.network or 'no network'}{seen}{direct}"
    return text, not fabric.devices


def _state(fabric: Fabric, name: str) -> list[str]:
    return [fabric.ports[name]] if name in fabric.ports else []


def _meaning(name: str) -> str:
    return SETTINGS.get(name) or ("read when distlib is installed" if name in INSTALL_SETTINGS else "unknown")


def _selftest(result: SelfTest) -> str:
    who = f"{plural(result.ranks, 'rank')} of {'the job' if result.in_job else 'its own'}"
    if result.error:
        return f"{who}: failed"
    registered, ordinary = (
        f"{result.large_bytes / seconds / 1e9:.2g} GB/s"
        for seconds in (result.registered_seconds, result.ordinary_seconds)
    )
    tried = plural(len(result.right) + len(result.wrong), "operation")
    return (
        f"{who}: {len(result.right)} of {tried} right\n"
        f"all_reduce of {size(result.small_bytes)}: {duration(result.small_seconds)}\n"
        f"all_reduce of {size(result.large_bytes)}: registered {registered}, ordinary {ordinary}"
    )
