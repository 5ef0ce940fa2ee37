"""`make gpu` without a GPU: parts that fail or hang, missing packages, tests that end early, one document."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import gpu_all
import gpu_outcomes
import gpu_tests
import psutil
import pytest
import torch
from gpu_parts import Done, Part, run_all
from gpu_summary import HEADINGS, append, collected, lines_of, merged, shown

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
ALONE = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # no worker of xdist
AROUND = {"date": "today", "machine": "a machine", "versions": "torch 2", "commit": "abc"}


def python(name: str, code: str, seconds: float = 10.0, **environ: str) -> Part:
    return Part(name, [sys.executable, "-c", code], seconds, environ)


def line(what: str, verdict: str = "") -> list[str]:
    return [what, "1", "a / b", "1 ms / 2 ms", "0.50x", "<= 1.00x", verdict]


# ---- parts ------------------------------------------------------------------------------------------------------

HANGS = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"], start_new_session=True)
print("child", child.pid, flush=True)
def waits_for_the_others():
    time.sleep(100)
waits_for_the_others()
"""


def test_a_part_that_fails_is_told_about_and_the_others_go_on(tmp_path: Path) -> None:
    told: list[Done] = []
    parts = [
        python("good", "print('fine')"),
        python("bad", "import sys; print('this is why'); sys.exit(3)"),
        python("killed", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"),
        Part("skipped", ["no-such-command"], 5.0, why_not="there is no card"),
        python("last", "import os; assert os.environ['WISH'] == 'granted'", WISH="granted"),
    ]
    dones = run_all(parts, 60.0, tmp_path, told.append)
    assert told == dones
    assert [(d.name, d.outcome, d.why) for d in dones] == [
        ("good", "passed", ""),
        ("bad", "failed", "exit code 3"),
        ("killed", "failed", "killed by SIGKILL"),
        ("skipped", "left out", "there is no card"),
        ("last", "passed", ""),
    ]
    assert "this is why" in dones[1].output and not dones[0].output
    assert "fine" in (tmp_path / "good.log").read_text()


def test_a_part_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    parts = [python("hangs", HANGS, 4.0), python("last", "pass", 20.0)]
    hung, last = run_all(parts, 24.0, tmp_path, lambda done: None)
    assert hung.outcome == "timed out" and "it was ended after 4 s" in hung.why and last.outcome == "passed"
    assert "waits_for_the_others" in hung.output, "its stack says where it hung"
    child = int(hung.output.split("child ")[1].split()[0])
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


def test_time_that_a_part_leaves_goes_to_the_next_and_none_is_left_over_the_total(tmp_path: Path) -> None:
    dones = run_all([python("quick", "pass", 20.0), python("next", "pass", 10.0)], 30.0, tmp_path, lambda done: None)
    assert dones[0].limit == pytest.approx(20.0, abs=3.0)  # what runs between the parts may have to wait for a core
    assert dones[1].limit == pytest.approx(30.0 - dones[0].seconds, abs=3.0)
    late = run_all([python("late", "pass", 10.0)], 0.0, tmp_path, lambda done: None)
    assert [(d.outcome, d.why) for d in late] == [("left out", "no time was left for it")]


# ---- results ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"lines": [', "kernels.json is not JSON"),
        ("[1, 2]", "holds no lines"),
        ('{"lines": [["too", "short"]]}', "holds no lines of 7 cells"),
        (None, "it wrote no results"),
    ],
)
def test_a_benchmark_without_results_that_can_be_read_has_failed(tmp_path: Path, text: str | None, why: str) -> None:
    (tmp_path / "kernels").mkdir()
    if text is not None:
        (tmp_path / "kernels/kernels.json").write_text(text)
    dones, documents = collected([Done("kernels", "passed", 1.0, 2.0, 0)], {"kernels": tmp_path / "kernels"})
    assert dones[0].outcome == "failed" and why in dones[0].why and not documents.get("kernels")


def document_of(*outcomes: str, verdict: str = "met", tests: tuple[str, ...] = ("passed",)) -> dict[str, Any]:
    names = ("build", "tests", "step")
    dones = [Done(name, outcome, 1.0, 2.0, 0) for name, outcome in zip(names, outcomes, strict=True)]
    results = [{"id": f"test_{i}", "outcome": outcome} for i, outcome in enumerate(tests)]
    found = {"step": [{"lines": [line("a step", verdict), line("a time")], "notes": ["measured"], "rows": [1]}]}
    return merged(dones, found, results, {"action": {"native": "build"}}, ["taken along"], AROUND)


def test_one_document_holds_parts_tests_and_bars() -> None:
    document = document_of("passed", "passed", "passed", tests=("passed", "skipped", "passed"))
    assert document["ok"] and document["samples"] == {"step": [[1]]} and document["seconds"] == 3.0
    assert document["bars"][0] == {
        "part": "step",
        "what": "a step",
        "ranks": 1,
        "compared": "a / b",
        "medians": "1 ms / 2 ms",
        "measured": "0.50x",
        "bar": "<= 1.00x",
        "met": True,
    }
    assert document["bars"][1]["met"] is None and document["notes"] == ["taken along", "measured"]
    assert json.loads(json.dumps(document)) == document
    text = shown(document)
    assert "2 passed, 1 skipped" in text and "1 of 1 bars met" in text and "native: build" in text and "abc" in text


@pytest.mark.parametrize(
    ("document", "ok"),
    [
        (document_of("passed", "passed", "passed", verdict="NOT met"), True),  # a bar is not a test
        (document_of("passed", "passed", "passed", tests=("skipped",)), False),  # nothing was tested
        (document_of("failed", "passed", "passed"), False),
        (document_of("passed", "failed", "passed", tests=("passed", "failed")), False),
        (document_of("passed", "passed", "timed out"), False),
        (document_of("passed", "left out", "passed", tests=()), False),
    ],
)
def test_all_is_well_only_where_everything_ran_and_some_test_passed(document: dict[str, Any], ok: bool) -> None:
    assert document["ok"] is ok


def test_tests_that_failed_or_did_not_end_are_named_in_the_table() -> None:
    lines = lines_of(document_of("passed", "timed out", "passed", tests=("passed", "failed", "started")))
    assert all(len(cells) == len(HEADINGS) for cells in lines)
    assert [(cells[1], cells[-1]) for cells in lines if cells[0] == "tests"][1:] == [
        ("test_1", "FAILED"),
        ("test_2", "DID NOT END"),
    ]


def test_the_command_writes_one_document_and_one_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its parts are small ones here; a document made elsewhere can be recorded."""
    monkeypatch.setattr(gpu_all, "WORK", tmp_path / "work")
    monkeypatch.setattr(gpu_all, "why_not", lambda source: "")
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setenv("DISTLIB_COMMIT", "")
    results = json.dumps({"lines": [line("a kernel", "met")], "notes": [], "rows": []})

    def writes(name: str, file: Path, text: str) -> Part:
        code = f"import pathlib as p; f = p.Path({str(file)!r}); f.parent.mkdir(exist_ok=True); f.write_text({text!r})"
        return python(name, code)

    def parts_of(selection: gpu_tests.Selection, work: Path, total: float) -> list[Part]:
        test = json.dumps({"id": "test_it", "outcome": "passed", "seconds": 1.0, "why": ""}) + "\n"
        build = json.dumps({"action": {"cuda": "keep"}, "notes": ["carried here"]})
        benchmarks = [writes(name, work / name / "x.json", results) for name in gpu_all.BENCHMARKS]
        return [
            writes("build", work / "build.json", build),
            writes("tests", work / "outcomes.jsonl", test),
            *benchmarks,
        ]

    so_far: list[dict[str, Any]] = []
    monkeypatch.setattr(gpu_all, "parts_of", parts_of)
    monkeypatch.setattr(gpu_all, "_tell", lambda done: so_far.append(json.loads((tmp_path / "gpu.json").read_text())))
    monkeypatch.setattr(sys, "argv", ["gpu_all.py", f"--out={tmp_path}", "--commit=1234567"])
    assert gpu_all.main() == 0
    assert [document["ok"] for document in so_far] == [False] * 4 + [True], "should the run itself be ended"
    assert [len(document["bars"]) for document in so_far] == [0, 0, 1, 2, 3]
    assert so_far[2]["parts"][3]["why"] == "the run ended before it"
    out = capsys.readouterr().out
    assert "1 passed" in out and "cuda: keep" in out and "carried here" in out and out.count("a kernel") == 3
    document = json.loads((tmp_path / "gpu.json").read_text())
    assert document["ok"] and document["surroundings"]["commit"] == "1234567"

    (tmp_path / "RESULTS.md").write_text("# Results\n\n")
    append(document, tmp_path / "RESULTS.md")
    section = (tmp_path / "RESULTS.md").read_text()
    assert section.count("| a kernel |") == 3 and "commit 1234567" in section
    document["ok"] = False
    (tmp_path / "gpu.json").write_text(json.dumps(document))
    monkeypatch.setattr(sys, "argv", ["gpu_all.py", f"--from={tmp_path / 'gpu.json'}"])
    assert gpu_all.main() == 1 and "a kernel" in capsys.readouterr().out


def test_with_less_time_each_part_is_promised_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "")
    half, whole = (
        {part.name: part.seconds for part in gpu_all.parts_of(gpu_tests.Selection([], []), tmp_path, total)}
        for total in (gpu_all.TOTAL / 2, gpu_all.TOTAL)
    )
    assert half == {name: seconds / 2 for name, seconds in whole.items()}
    assert sum(whole.values()) == gpu_all.TOTAL


def test_results_that_are_not_there_are_told_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_all.py", f"--from={tmp_path / 'gpu.json'}"])
    assert gpu_all.main() == 2
    assert capsys.readouterr().err == f"make gpu: there is no {tmp_path / 'gpu.json'}\n"
    (tmp_path / "gpu.json").write_text("{}")
    monkeypatch.setattr(gpu_all, "NEEDED", ("no_such_package",))
    assert gpu_all.main() == 2 and "has no no_such_package: install it" in capsys.readouterr().err


def test_who_asks_for_a_gpu_in_a_test_does_not_start_cuda_before_ranks_are_forked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "")
    (part,) = [part for part in gpu_all.parts_of(gpu_tests.Selection([], []), tmp_path) if part.name == "tests"]
    code = "import torch; print(torch.cuda._nvml_based_avail())"
    done = subprocess.run([sys.executable, "-c", code], env={**ALONE, **part.environ}, capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr


def test_a_machine_without_a_gpu_or_without_packages_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        assert "finds no GPU" in gpu_all.why_not()
    monkeypatch.setattr(gpu_all, "NEEDED", ("torch", "no_such_package"))
    assert "no no_such_package: install it, or say make gpu PYTHON=" in gpu_all.why_not()


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_gpu_uses_the_python_that_has_torch_and_installs_nothing(tmp_path: Path) -> None:
    (tmp_path / "venv/bin").mkdir(parents=True)
    told = tmp_path / "told"
    own = tmp_path / "venv/bin/python"
    own.write_text(f'#!/bin/sh\necho "$@" > {told}\n')
    own.chmod(0o755)
    bare = tmp_path / "bare"
    bare.write_text('#!/bin/sh\n[ "$1" != -c ] || exit 1\necho run by bare > ' + str(told) + "\n")
    bare.chmod(0o755)

    def make(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["make", "-C", str(ROOT), "gpu", *arguments], capture_output=True, text=True, timeout=60)

    venv = f"VENV={tmp_path / 'venv'}"
    assert make(venv, f"PYTHON={bare}", "ARGS=--record").returncode == 0
    assert told.read_text().split() == ["benchmarks/gpu_all.py", "--record"], "it has no torch, the environment may"
    assert make(f"PYTHON={bare}", f"VENV={tmp_path / 'none'}").returncode == 0
    assert told.read_text() == "run by bare\n", "there is no other"
    nothing = make("PYTHON=", f"VENV={tmp_path / 'none'}")
    assert nothing.returncode != 0 and "no Python >= 3.10 found" in nothing.stderr


# ---- tests ------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Test files, of which some are for GPUs, and some import what may be missing, by way of a helper."""
    for name, text in {
        "test_cpu.py": "import hypothesis\n",
        "test_plain.py": "import pytest\nfrom folder import thing\n@pytest.mark.gpu\ndef test_it(): ...\n",
        "test_card.py": "import helper\nimport hypothesis\n",
        "test_later.py": "def test_it():\n    import psutil\n    # pytest.mark.gpu\n",
        "helper.py": "from psutil import Process\nfrom more.deep import x\nCARDS = pytest.mark.card\n",
        "folder/thing.py": "",
    }.items():
        (tmp_path / "tests" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "tests" / name).write_text(text)
    return tmp_path


def test_files_whose_packages_are_missing_are_left_out_by_name(checkout: Path) -> None:
    whole = gpu_tests.select(checkout, lambda package: True)
    assert whole.arguments[-3:] == ["tests/test_card.py", "tests/test_later.py", "tests/test_plain.py"]
    assert whole.arguments[:2] == ["-m", "gpu or card"] and "-o" not in whole.arguments and not whole.notes
    assert "--timeout" in whole.arguments and "--numprocesses" in whole.arguments

    bare = gpu_tests.select(checkout, lambda package: package not in ("hypothesis", "pytest_timeout"))
    assert bare.arguments[-3:] == whole.arguments[-3:] and bare.path == (str(BENCHMARKS / "stand_ins"),)
    assert bare.notes == [
        "pytest-timeout is not installed: no test has a time limit of its own",
        "hypothesis is not installed: tests over drawn values are skipped",
    ]

    poor = gpu_tests.select(checkout, lambda package: package in ("pytest", "psutil"))
    assert poor.arguments[-2:] == ["tests/test_later.py", "tests/test_plain.py"] and "-o" in poor.arguments
    assert "--timeout" not in poor.arguments and "--numprocesses" not in poor.arguments
    assert poor.notes[0] == "tests/test_card.py is left out: more not installed"
    assert "pytest-timeout is not installed" in poor.notes[1] and not poor.why_not

    assert "pytest is missing" in gpu_tests.select(checkout, lambda package: False).why_not
    (checkout / "tests/conftest.py").write_text("import psutil\n")
    none = gpu_tests.select(checkout, lambda package: package == "pytest")
    assert none.why_not.startswith("no test can run: tests/test_card.py is left out: more, psutil not installed")


DRAWN_TESTS = """
import pytest
from hypothesis import HealthCheck, example, given, settings, strategies as st
numbers = st.lists(st.integers(0, 3) | st.none(), max_size=3).map(len)
@pytest.mark.parametrize("size", [1, 2])
@settings(max_examples=3, suppress_health_check=list(HealthCheck))
@given(numbers, st.data())
@example(1, None)
def test_drawn(number, data, size): assert False
def test_plain(): pass
"""


def test_without_hypothesis_only_tests_over_drawn_values_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "test_drawn.py").write_text(DRAWN_TESTS)
    path = os.pathsep.join([str(gpu_tests.STAND_INS), str(BENCHMARKS)])
    environ = {**ALONE, "PYTHONPATH": path, "DISTLIB_OUTCOMES": str(tmp_path / "outcomes")}
    command = gpu_tests.command(gpu_tests.Selection(["-p", "no:hypothesispytest"], []))
    subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True)
    assert [(test["outcome"], test["why"]) for test in gpu_outcomes.read(tmp_path / "outcomes")] == [
        *[("skipped", "hypothesis is not installed")] * 2,
        ("passed", ""),
    ]


def test_tests_in_several_processes_are_written_down_once(tmp_path: Path) -> None:
    pytest.importorskip("xdist")
    many = "import pytest\n@pytest.mark.parametrize('i', range(6))\ndef test(i): assert i\n"
    (tmp_path / "test_many.py").write_text(many)
    environ = {**ALONE, "PYTHONPATH": str(BENCHMARKS), "DISTLIB_OUTCOMES": str(tmp_path / "outcomes")}
    command = gpu_tests.command(gpu_tests.Selection(["--numprocesses", "2"], []))
    subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True)
    assert (tmp_path / "outcomes").read_text().count("started") == 6
    assert [test["outcome"] for test in gpu_outcomes.read(tmp_path / "outcomes")].count("passed") == 5


SOME_TESTS = """
import os, signal, pytest
def test_passes(): pass
def test_fails(): assert 1 == 2
def test_skips(): pytest.skip("no card")
@pytest.mark.xfail(reason="not yet")
def test_known(): assert False
@pytest.fixture
def broken():
    yield
    raise ValueError("cannot be taken down")
def test_teardown(broken): pass
def test_dies(): os.kill(os.getpid(), signal.SIGKILL)
def test_never_reached(): pass
"""


def test_outcomes_survive_the_end_of_the_process(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(SOME_TESTS)
    (tmp_path / "test_broken.py").write_text("import no_such_module\n")
    (tmp_path / "pyproject.toml").write_text('[tool.pytest.ini_options]\ntimeout = 9\naddopts = "--strict-config"\n')
    environ = {**ALONE, "PYTHONPATH": str(BENCHMARKS), "DISTLIB_OUTCOMES": str(tmp_path / "outcomes")}
    command = gpu_tests.command(gpu_tests.Selection(["-p", "no:timeout"], []))
    strict = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert "Unknown config option: timeout" in strict.stderr, "this is what LENIENT is for"
    subprocess.run([*command, *gpu_tests.LENIENT], cwd=tmp_path, env=environ, capture_output=True)
    found = {test["id"].split("::")[-1]: test for test in gpu_outcomes.read(tmp_path / "outcomes")}
    assert {name: test["outcome"] for name, test in found.items()} == {
        "test_broken.py": "failed",
        "test_passes": "passed",
        "test_fails": "failed",
        "test_skips": "skipped",
        "test_known": "expected failure",
        "test_teardown": "failed",
        "test_dies": "started",
    }
    assert found["test_skips"]["why"] == "no card" and "assert 1 == 2" in found["test_fails"]["why"]
    assert "no_such_module" in found["test_broken.py"]["why"] and "taken down" in found["test_teardown"]["why"]
    with (tmp_path / "outcomes").open("a") as file:
        file.write('{"id": "cut o')  # as where a process is killed while it writes
    assert len(gpu_outcomes.read(tmp_path / "outcomes")) == len(found)
