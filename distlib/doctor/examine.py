"""The doctor's visit: gather the facts, try ranks out (a job's, else two of our own), check."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

import distlib
from distlib.comm.interfaces import meeting_point
from distlib.doctor.check_job import check_job, check_selftest
from distlib.doctor.checks import check
from distlib.doctor.facts import GIB, Facts, Node, Problem, Report, SelfTest
from distlib.doctor.gather import gather, network
from distlib.doctor.local_ranks import Ending, LocalRanks
from distlib.doctor.machine import available_memory
from distlib.doctor.nccl_log import recorded
from distlib.doctor.selftest import measure
from distlib.launchers import LaunchError, detect

LOCAL_RANKS = 2
_START_SECONDS = 60.0  # for ranks to import torch, beside the timeout of their collectives
_OUTPUT_LINES = 6


class Absent(Exception):
    """This rank has nothing to show: rank 0 does. The cause, if any, is why this rank failed."""


def examine(selftest: bool, timeout: float) -> Report:
    """The report. In a job every rank must call; ranks other than 0 raise Absent.

    timeout: seconds, for the ranks to meet and for each collective of the self-test.
    """
    try:
        in_job = detect().size > 1
    except LaunchError:
        in_job = False  # the report says what is wrong with the launcher's variables
    if in_job and selftest:
        return _with_job(timeout)
    if in_job and detect().rank > 0:
        raise Absent
    return _alone(selftest and not in_job, timeout)


# ---- ranks of our own --------------------------------------------------------------------------------------


def _alone(selftest: bool, timeout: float) -> Report:
    """This process's facts; ranks of the self-test import torch meanwhile."""
    if not selftest:
        return _report(gather(), None)
    arguments = (timeout, large_bytes())
    # One host is tried out: DISTLIB_NODES would ask for more ranks than there are.
    env = {"DISTLIB_NODES": None}
    with LocalRanks(LOCAL_RANKS, "distlib.doctor.selftest:on_local_rank", *arguments, env=env) as ranks:
        facts = gather()
        return _report(facts, outcome(ranks.wait(timeout + _START_SECONDS)))


def large_bytes() -> int:
    """The larger size to try: 64 MiB, or less where memory is short."""
    return (64 << 20) if available_memory() > GIB else (4 << 20)


def outcome(endings: list[Ending]) -> SelfTest:
    """The self-test's result from how its ranks ended."""
    failed = [ending for ending in endings if not ending.ok]
    if not failed:
        return SelfTest.model_validate(endings[0].value).model_copy(update={"in_job": False})
    # Who had to be killed waited for those that failed, if any did.
    first = [ending for ending in failed if ending.code is not None] or failed
    told: dict[str, int] = {}
    for ending in first:
        told.setdefault(_reason(ending), ending.rank)
    error = "\n".join(f"rank {rank} {reason}" for reason, rank in told.items())
    return SelfTest(ranks=len(endings), in_job=False, error=error)


def _reason(ending: Ending) -> str:
    """Why a rank failed: the end of its traceback, or where it was when it was killed."""
    lines = [line for line in ending.output.strip().splitlines() if line.strip()]
    if ending.code is None:
        return "did not finish in time: " + ("\n".join(lines[:_OUTPUT_LINES]) or "it printed nothing")
    return "failed: " + (_last_exception(lines) or f"it printed nothing and ended with code {ending.code}")


def _last_exception(lines: list[str]) -> str:
    """The message at the end of a traceback, without the exception's module; else the last lines."""
    starts = [number for number, line in enumerate(lines) if line.startswith("Traceback ")]
    if not starts:
        return "\n".join(lines[-_OUTPUT_LINES:])
    after = [line for line in lines[starts[-1] + 1 :] if not line.startswith(" ")]
    return "\n".join(after[:_OUTPUT_LINES])


def _report(facts: Facts, selftest: SelfTest | None) -> Report:
    found = [*check(facts), *(check_selftest(selftest) if selftest else [])]
    return Report(facts=facts, selftest=selftest, problems=_errors_first(found))


def _errors_first(problems: list[Problem]) -> list[Problem]:
    return sorted(problems, key=lambda problem: problem.level != "error")


# ---- the job's ranks ---------------------------------------------------------------------------------------


def _with_job(timeout: float) -> Report:
    """The facts of all ranks and a self-test between them; Absent on ranks other than 0."""
    facts, launch = gather(), detect()
    everyone: list[Facts] = []
    nodes: list[Node] = []
    try:
        with recorded(os.environ) as nccl_said, distlib.init(timeout=timedelta(seconds=timeout)) as world:
            on_gpu = world.device.type == "cuda"
            facts.gpus.mine = facts.gpus.devices[world.device.index].identity if on_gpu else ""
            facts.network = network(os.environ, meeting_point(_world().get_group_store()))
            everyone = [Facts.model_validate_json(text) for text in _gather(facts.model_dump_json())]
            nodes = [Node(host=everyone[ranks[0]].machine.host, ranks=list(ranks)) for ranks in world.topology.nodes]
            devices = [torch.device("cpu")] + ([world.device] if each_has_a_gpu(everyone) else [])
            result = measure(devices, min(_gather(large_bytes())))
            for each, said in zip(everyone, _gather(nccl_said()), strict=True):
                each.fabric.said = said
    except (RuntimeError, ValueError, OSError, MemoryError) as error:
        failed = SelfTest(ranks=launch.size, in_job=True, error=str(error))
        if launch.rank > 0:
            raise Absent from error
        return _report_of_job(everyone, nodes, failed) if nodes else _report(facts, failed)
    if launch.rank > 0:
        raise Absent
    return _report_of_job(everyone, nodes, result)


def each_has_a_gpu(everyone: list[Facts]) -> bool:
    """Whether NCCL can be tried: every rank uses a GPU, and no two the same one, which it refuses."""
    used = [facts.gpus.mine for facts in everyone]
    return all(used) and len(set(used)) == len(used)


def _report_of_job(everyone: list[Facts], nodes: list[Node], selftest: SelfTest) -> Report:
    problems = _errors_first([*check_job(everyone, nodes), *check_selftest(selftest)])
    return Report(facts=everyone[0], nodes=nodes, selftest=selftest, problems=problems)


def _world() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None, "asked for after init() only"
    return group


def _gather(value: Any) -> list[Any]:
    """The value of every rank, on every rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
