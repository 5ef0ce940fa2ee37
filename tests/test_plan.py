"""A plan: refused with every reason, or kept unchanged through any file; no setting of it is inert."""

from __future__ import annotations

import inspect
import itertools
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from distlib.activations import checkpoint_activations
from distlib.activations.apply import _require_consistent
from distlib.data_parallel import DataParallel
from distlib.optim import GradScaler
from distlib.plan import Activations, Mesh, Plan, Precision, checked, options, refusals, world
from distlib.sharded import ShardedDataParallel
from distlib.sharded import options as sharded_options

ROOT = Path(__file__).parents[1]

# ------------------------------------------------------------ values

# A value other than the default for each setting, and what a plan needs besides to have it.
OTHER: dict[str, tuple[Any, dict[str, Any]]] = {
    "pipeline": (2, {}),
    "virtual": (3, {"pipeline": 2, "schedule": "interleaved"}),
    "schedule": ("zb-h1", {"pipeline": 2}),
    "microbatches": (4, {"pipeline": 2}),
    "split": (["blocks.1"], {"pipeline": 2}),
    "costs": ("estimated", {"pipeline": 2}),
    "limit": (3.0, {"pipeline": 2, "schedule": "auto"}),
    "shape_header": (True, {"pipeline": 2}),
    "stage": (3, {}),
    "partition_size": (2, {"stage": 3}),
    "units": (["Linear"], {"stage": 3}),
    "reshard_after_forward": (False, {"stage": 3}),
    "hierarchical": (False, {"stage": 3}),
    "prefetch": (1, {"stage": 3}),
    "shard_optimizer": ("world", {"stage": 1}),
    "gather_dtype": ("int8", {"stage": 3}),
    "ownership": ("whole", {"stage": 1}),
    "offload": ("state", {"stage": 1}),
    "bucket_mb": (1.0, {}),
    "find_unused_parameters": (True, {}),
    "activations.policy": ("full", {}),
    "activations.budget": (0.5, {}),
    "activations.blocks": (["Linear"], {"policy": "full"}),
    "activations.folder": ("disk", {"policy": "offload"}),
    "activations.resident": (2, {"policy": "offload"}),
    "activations.window": ("1MiB", {"policy": "offload"}),
    "precision.dtype": ("bf16", {}),
    "precision.reduce": ("bf16", {}),
    "precision.output": ("fp32", {"stage": 1}),
    "precision.init_scale": (2.0, {"dtype": "fp16"}),
    "precision.growth_interval": (5, {"dtype": "fp16"}),
    "clip": (1.0, {}),
    "timeout": (9.0, {"pipeline": 2}),
    "seed": (7, {}),
    "engine": ("deepspeed", {}),
}


def with_setting(name: str, value: Any, base: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of a Plan, for a dotted name; a base's keys are of the nested value where it has them."""
    first, _, inner = name.partition(".")
    if not inner:
        return {**base, name: value}
    nested = base.get(first)
    nested = {} if nested is None else dict(nested) if isinstance(nested, dict) else {_first(first): nested}
    fields = {"activations": Activations, "precision": Precision}[first].model_fields
    nested |= {key: v for key, v in base.items() if key in fields}
    rest = {key: v for key, v in base.items() if key not in fields and key != first}
    return {**rest, first: {**nested, inner: value}}


def _first(name: str) -> str:
    return {"activations": "policy", "precision": "dtype"}[name]


def all_settings() -> list[str]:
    nested = {"activations": Activations, "precision": Precision}
    names = [name for name in Plan.model_fields if name not in nested]
    return names + [f"{name}.{inner}" for name, kind in nested.items() for inner in kind.model_fields]


def plan_of(kwargs: dict[str, Any]) -> Plan | None:
    try:
        return Plan(**kwargs)
    except ValueError:
        return None


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Any sound plan: settings are added one by one, and left out where they are refused."""
    kwargs: dict[str, Any] = {}
    for name in draw(st.permutations(sorted(OTHER))):
        if name != "engine" and draw(st.booleans()):
            value, needed = OTHER[name]
            more = with_setting(name, value, {**kwargs, **(needed if draw(st.booleans()) else {})})
            kwargs = more if plan_of(more) else kwargs
    return Plan(**kwargs)


@settings(max_examples=40, deadline=None)
@given(plans())
def test_a_plan_is_the_same_after_dict_text_file_and_pickle(tmp_path_factory: Any, plan: Plan) -> None:
    folder = tmp_path_factory.mktemp("plans")
    for defaults in (True, False):
        assert Plan(**plan.to_dict(defaults)) == plan
        (folder / "plan.yaml").write_text(plan.to_yaml(defaults))
        (folder / "plan.json").write_text(json.dumps(plan.to_dict(defaults)))
        for name in ("plan.yaml", "plan.json"):
            assert Plan.from_file(folder / name) == plan
    assert pickle.loads(pickle.dumps(plan)) == plan == eval(repr(plan)) and hash(plan) == hash(plan.replace())
    assert all(name in str(plan) for name in plan.changed())
    assert len(plan.expected(1000, 8).memory) == plan.pipeline, "what is allowed can be laid out, and has a schedule"


def test_short_forms_mean_the_long_ones() -> None:
    short = Plan(activations="selective", precision="bf16", offload=Path("a/b"), stage=1)
    assert short == Plan(activations={"policy": "selective"}, precision={"dtype": "bf16"}, offload="a/b", stage=1)
    assert Plan(activations=None, precision="fp32") == Plan(activations=Activations(), precision=Precision()) == Plan()
    assert short.to_dict(False) == {"stage": 1, "offload": "a/b", "activations": "selective", "precision": "bf16"}


WRONG = {
    "pipeline": (0, True, "2", 2.0, None),
    "virtual": (0, False),
    "schedule": ("zb_h1", 1, None),
    "microbatches": (0, -1, 1.5),
    "split": ([], [1], "half", {}),
    "costs": ("guessed", None),
    "limit": (0.5, float("inf"), "2"),
    "shape_header": (1, "yes"),
    "stage": (4, -1, True, "3"),
    "partition_size": (0, "host", 1.5, False),
    "units": ("Block", [], [nn.Linear]),
    "reshard_after_forward": (1, 0, "yes", None),
    "hierarchical": ("yes", 1),
    "prefetch": (-1, True),
    "shard_optimizer": ("all", None),
    "gather_dtype": ("int4", torch.int8),
    "ownership": ("half", None),
    "offload": ("", 1),
    "bucket_mb": (0, -1.0, float("nan")),
    "find_unused_parameters": (1, "yes"),
    "activations": ("partial", 3, ["full"]),
    "precision": ("bf8", torch.bfloat16, None),
    "activations.policy": ("some",),
    "activations.budget": (0, -1, 1.5, "2 lots", True),
    "activations.blocks": ("Block",),
    "activations.folder": ("",),
    "activations.resident": (-1,),
    "activations.window": (0, "wide"),
    "precision.dtype": ("int8", None),
    "precision.reduce": ("int8",),
    "precision.output": (1,),
    "precision.init_scale": (0.0, "big"),
    "precision.growth_interval": (0,),
    "clip": (0, -1.0, "1", True),
    "timeout": (0, float("inf")),
    "seed": (-1, 2**63, 0.5),
    "engine": ("horovod", None),
}


def test_wrong_values_are_refused_with_key_value_and_what_is_right() -> None:
    assert {*all_settings(), "activations", "precision"} == WRONG.keys()
    for name, values in WRONG.items():
        for value in values:
            with pytest.raises(ValueError) as error:
                Plan(**with_setting(name, value, {}))
            text = str(error.value)
            nested = name in ("activations", "precision") and isinstance(value, str)
            shown = f"{name}.{_first(name)}" if nested else name
            assert f"{shown}={value!r}" in text, (name, value, text)
            assert "must be" in text or "there is no such" in text, text


def test_all_problems_are_told_at_once_and_unknown_keys_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        Plan(stage=4, micro_batches=8, precision={"dtype": "bf8", "outptu": "fp32"}, schedule="zbh1")
    text = str(error.value)
    assert text.startswith("Plan: 5 problems") and "stage=4: must be 0 (replicated), 1, 2 or 3" in text
    assert "micro_batches=8: unknown key; did you mean 'microbatches'?" in text
    assert "precision.outptu='fp32': unknown key; did you mean 'output'?" in text
    assert "precision.dtype='bf8': must be" in text and "did you mean 'zb-h1'?" in text
    with pytest.raises(ValueError, match="Plan: activations.3=4: unknown key; known are policy"):
        Plan(activations={"policy": "full", 3: 4})
    with pytest.raises(ValueError, match="frozen"):
        Plan().stage = 3  # type: ignore[misc]

    for name, content, words in (
        ("plan.yaml", "stage: 3\nstage: 2\n", "'stage' stands twice, as 3 and 2"),
        ("plan.json", '{"stage": 3, "stage": 2}', "'stage' stands twice"),
        ("plan.yaml", "- stage\n", "must hold settings by name"),
        ("plan.yaml", "stage: [3\n", "this is not YAML"),
        ("plan.json", "{stage: 3}", "line 1, column 2"),
        ("plan.toml", "stage = 3", "ends in .yaml, .yml, .json"),
        ("plan.yaml", "stage: 9\n", "stage=9: must be"),
        (
            "plan.yaml",
            "clip: 1e-3\n",
            "must be a number above 0, or None; it is text. With an exponent, YAML wants a point and a sign: 1.0e-3",
        ),
        ("plan.yaml", "precision: {dtype: fp16, init_scale: 1.5E4}\n", "YAML wants a point and a sign: 1.5e+4"),
        (
            "plan.yaml",
            "precision: {dtype: fp16, init_scale: 1.0e+39}\n",
            "init_scale=1e+39: must be a number above 0, at mo",
        ),
        ("plan.yaml", "activations: {1: 2}\n", "activations.1=2: unknown key; known are policy"),
        ("plan.yaml", "precision: {dtype: bf16, true: 2}\n", "precision.True=2: unknown key"),
        ("plan.yaml", "? [a]\n: b\n", "['a'] is no name of a setting, for 'b'"),
        ("plan.yaml", "precision: {{a: b}: c}\n", "{'a': 'b'} is no name of a setting, for 'c'"),
    ):
        path = tmp_path / name
        path.write_text(content)
        with pytest.raises(ValueError) as error:
            Plan.from_file(path)
        assert words in str(error.value) and str(path) in str(error.value)


def test_yaml_is_asked_for_only_by_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    (tmp_path / "plan.json").write_text('{"stage": 2}')
    assert Plan.from_file(tmp_path / "plan.json") == Plan(stage=2)
    (tmp_path / "plan.yaml").write_text("stage: 2")
    with pytest.raises(ModuleNotFoundError, match="pip install pyyaml"):
        Plan.from_file(tmp_path / "plan.yaml")


# ------------------------------------------------------------ what does not go together

CONTEXTS: dict[str, dict[str, Any]] = {
    "pipeline=1": {},
    'a schedule other than "interleaved"': {"pipeline": 2},
    'a schedule other than "auto"': {"pipeline": 2},
    "split= names": {"pipeline": 2, "split": ["a"]},
    "pipeline=2 or more": {"pipeline": 2},
    "stage=0": {},
    "stage=1, 2 or 3": {"stage": 2},
    "stage=1 or 2": {"stage": 1},
    "stage=2 or 3": {"stage": 3},
    'ownership="whole"': {"stage": 1, "ownership": "whole"},
    'precision "fp32" or "bf16"': {"precision": {"dtype": "bf16"}},
    "activations.budget": {"activations": {"budget": "2GiB"}},
    "activations.budget in a pipeline": {"pipeline": 2, "activations": {"budget": "2GiB"}},
    "neither activations.policy nor activations.budget": {},
    'activations "full" or "selective"': {"activations": {"policy": "full"}},
    "activations.budget without activations.folder": {"activations": {"budget": "2GiB"}},
    'engine="deepspeed"': {"engine": "deepspeed"},
}


@pytest.mark.parametrize("row", refusals.TABLE, ids=lambda row: f"{row.where}: {row.settings[0]}")
def test_every_row_of_the_table_refuses(row: refusals.Refusal) -> None:
    base = CONTEXTS[row.where]
    assert Plan(**base), "the context alone is sound"
    for name in row.settings:
        value = OTHER[name][0]
        with pytest.raises(ValueError) as error:
            Plan(**with_setting(name, value, base))
        text = str(error.value)
        assert row.where in text and row.why in text and row.fix in text and f"{name}=" in text


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 3),
    st.sampled_from([True, False, 2]),
    st.sampled_from(["partition", "world"]),
    st.sampled_from([None, "int8"]),
    st.sampled_from(["flat", "whole"]),
)
def test_a_plan_allows_what_sharding_allows(stage: int, kept: Any, shard: str, gather: Any, ownership: str) -> None:
    plan = plan_of(
        {
            "stage": stage,
            "reshard_after_forward": kept,
            "shard_optimizer": shard,
            "gather_dtype": gather,
            "ownership": ownership,
        }
    )
    mixed = sharded_options.MixedPrecision()
    quantized = torch.int8 if gather else None
    chosen = sharded_options.Options(stage, mixed, kept, "auto", 2, None, shard, quantized, ownership)
    try:
        sharded_options.check(chosen)
    except ValueError:
        assert plan is None
    else:
        assert plan is not None


def test_a_plan_allows_what_activations_allow() -> None:
    kept: tuple[tuple[str, tuple[Any, ...]], ...] = (
        ("policy", (None, "full", "selective", "offload")),
        ("budget", (None, "2GiB", 0.5)),
        ("folder", (None, "disk")),
        ("resident", (None, 2)),
        ("window", (None, "1MiB")),
    )
    allowed = 0
    for values in itertools.product(*(of for _, of in kept)):
        chosen = {name: value for (name, _), value in zip(kept, values, strict=True)}
        plan = plan_of({"activations": chosen})
        if chosen["policy"] is None and chosen["budget"] is None:
            assert (plan is not None) == (chosen == dict.fromkeys(chosen))
            continue
        policy = chosen["policy"] or "full"
        if chosen["budget"] is not None and chosen["policy"] == "full":
            assert plan is None  # checkpoint_activations cannot tell its default from the word
            continue
        arguments = (policy, chosen["budget"], "inputs", None, chosen["folder"], chosen["resident"], chosen["window"])
        try:
            _require_consistent(*arguments)
        except ValueError:
            assert plan is None, chosen
        else:
            assert plan is not None, chosen
            allowed += 1
    assert allowed > 10


# ------------------------------------------------------------ nothing is inert

BY_ENGINE = {"clip", "engine"}  # Engine and parallelize read them from the plan


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))


def effects(plan: Plan) -> Any:
    """All that follows from a plan, but the plan itself."""
    mesh = Mesh.of(plan, 8)
    module = Small()
    return (
        mesh,
        options.data_parallel(plan),
        options.sharded(plan, module),
        options.pipeline(plan),
        options.activations(plan, module),
        options.autocast(plan),
        options.scaler(plan),
        options.seed(plan, mesh.place(3)),
    )


@pytest.mark.parametrize("name", all_settings())
def test_no_setting_is_inert(name: str) -> None:
    value, base = OTHER[name]
    with_it = Plan(**with_setting(name, value, base))
    default = refusals.value_of(Plan(), name)
    without = Plan(**with_setting(name, default, base))
    assert with_it != without
    assert (effects(with_it) != effects(without)) == (name not in BY_ENGINE)


def test_options_are_the_wrappers_own_arguments() -> None:
    plan = Plan(stage=1, activations="full", precision="fp16")
    module = Small()
    for kind, given_ in (
        (DataParallel, options.data_parallel(plan)),
        (ShardedDataParallel, options.sharded(plan, module)),
        (checkpoint_activations, options.activations(plan, module)),
        (GradScaler, options.scaler(plan)),
    ):
        assert given_ is not None and given_.keys() <= inspect.signature(kind).parameters.keys()
    made = sharded_options.Options(
        **{key: value for key, value in options.sharded(plan, module).items() if key not in ("units", "partition_size")}
    )
    sharded_options.check(made)
    assert options.activations(plan, module)["policy"] == "full"
    checkpoint_activations(module, **options.activations(plan, module)).remove()


def test_classes_are_found_by_name() -> None:
    module = Small()
    assert options.classes("units", "auto", module) == "auto"
    assert options.classes("units", ["Linear", "torch.nn.modules.container.ModuleList"], module) == [
        nn.Linear,
        nn.ModuleList,
    ]
    assert options.classes("units", ["Linear"], nn.ReLU(), module) == [], "a part need not have it"
    with pytest.raises(ValueError, match=r"units=\['Linaer'\]: no module is a 'Linaer'; did you mean 'Linear'"):
        options.classes("units", ["Linaer"], module)
    twin = type("Linear", (nn.Linear,), {"__module__": "elsewhere"})
    module.blocks.append(twin(2, 2))
    with pytest.raises(ValueError, match=r"'Linear' may be any of .*elsewhere\.Linear"):
        options.classes("units", ["Linear"], module)
    assert options.classes("units", ["elsewhere.Linear"], module) == [twin]


# ------------------------------------------------------------ beside


def test_the_document_has_the_tables() -> None:
    text = (ROOT / "docs" / "plan.md").read_text()
    for table in (
        checked.markdown(Plan),
        checked.markdown(Precision),
        checked.markdown(Activations),
        refusals.markdown(),
        world.markdown(),
    ):
        assert table in text, f"docs/plan.md lacks this table, as it is now:\n{table}"


@pytest.mark.parametrize("path", sorted((ROOT / "examples" / "plans").glob("*")), ids=lambda path: path.name)
def test_ready_plans_fit_eight_ranks(path: Path) -> None:
    plan = Plan.from_file(path)
    plan.check(8)
    assert plan.changed() and len(plan.expected(1000, 8).memory) == plan.pipeline


def test_importing_a_plan_is_cheap() -> None:
    heavy = ("distlib.comm.group", "distlib.world", "distlib.sharded", "distlib.pipeline", "yaml", "deepspeed")
    code = f"import sys, distlib.plan; print([m for m in {heavy!r} if m in sys.modules])"
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert made.stdout.strip() == "[]"
