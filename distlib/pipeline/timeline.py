"""A simulated schedule as a picture: plain text, or PNG with matplotlib.

rank 0  F0 F1 F2 ........... BW0-- F3 BW1-- .. BW2-- .. BW3--
rank 1  .. F0 F1 ..... BW0-- F2 BW1-- F3 BW2-- .. BW3--
rank 2  ..... F0 BW0-- F1 BW1-- F2 BW2-- F3 BW3--
"""

from __future__ import annotations

from pathlib import Path

from distlib.pipeline.actions import COMPUTE, Action, Kind
from distlib.pipeline.simulate import Simulation

_COLOURS = {Kind.F: "#4c78a8", Kind.B: "#72b7b2", Kind.W: "#8cb369", Kind.FULL: "#5fa37f"}


def draw(simulation: Simulation, width: int | None = None) -> str:
    """The compute of every rank as one line of text, time to the right, and a line of numbers below.

    A block begins with its label and is as long as the action takes: kind and micro-batch, with the stage before it
    (as in the tokens of `actions`) where ranks hold several. Dots are idle time. width: most columns of the picture;
    default: wide enough for every label. Where one would not fit, all blocks show their kind only; an action of less
    than half a column may not be seen at all.
    """
    several = any(len(simulation.schedule.stages_of(rank)) > 1 for rank in range(simulation.schedule.ranks))
    computes = [
        [(action, start, end) for action, start, end in line if action.kind in COMPUTE] for line in simulation.lines
    ]
    end = max((line[-1][2] for line in computes if line), default=0.0)
    names = [f"rank {rank}" for rank in range(len(computes))]
    margin = max(map(len, names)) + 2
    if width is None:
        # Rounding may cost one column of a block, hence one more than label and space.
        needs = [(len(_label(a, several)) + 1, e - s) for line in computes for a, s, e in line if e > s]
        scale = max((columns / time for columns, time in needs), default=1.0)
    else:
        if width <= margin:
            raise ValueError(f"timeline: width is {width}; give more than the {margin} columns of the ranks' names")
        scale = (width - margin) / end if end else 1.0
    blocks = [[(a, round(s * scale), round(e * scale)) for a, s, e in line] for line in computes]
    labelled = all(len(_label(a, several)) <= max(e - s, 1) for line in blocks for a, s, e in line)
    rows = []
    for name, line in zip(names, blocks, strict=True):
        text, at = "", 0
        for action, first, last in line:
            label = _label(action, several) if labelled else action.kind.value
            text += _fill("", first - at, ".") + _fill(label, last - first, "-")
            at = last
        rows.append(f"{name:<{margin}}{text}".rstrip())
    return "\n".join([*rows, str(simulation)])


def _label(action: Action, several: bool) -> str:
    return f"{action.stage if several else ''}{action.kind.value}{action.micro_batch}"


def _fill(text: str, columns: int, filler: str) -> str:
    """`text` and fillers in `columns` columns, the last one a space unless the text needs it."""
    if columns <= len(text):
        return text[: max(columns, 0)]
    if columns == 1:
        return filler
    return text.ljust(columns - 1, filler) + " "


def save_png(simulation: Simulation, path: str | Path, *, width: float = 14.0) -> None:
    """The same as a PNG file, `width` inches wide, one colour per kind, later stages of a rank paler.

    Needs matplotlib, from the extra `bench`; raises RuntimeError without it.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError(
            "a PNG time line needs matplotlib: pip install 'distlib-train[bench]'; `draw` makes plain text without it"
        ) from error
    schedule = simulation.schedule
    figure = Figure(figsize=(width, 0.6 + 0.4 * schedule.ranks), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    span = simulation.step_time or 1.0
    for rank, line in enumerate(simulation.lines):
        stages = schedule.stages_of(rank)
        for action, start, end in line:
            if action.kind not in COMPUTE:
                continue
            shade = 1.0 - 0.45 * stages.index(action.stage) / max(1, len(stages) - 1)
            axes.barh(rank, end - start, 0.9, start, color=_COLOURS[action.kind], alpha=shade, ec="black", lw=0.4)
            if (end - start) / span * width > 0.12:  # inches that a number needs
                axes.text((start + end) / 2, rank, str(action.micro_batch), ha="center", va="center", fontsize=6)
    axes.set_yticks(range(schedule.ranks), [f"rank {rank}" for rank in range(schedule.ranks)])
    axes.invert_yaxis()
    axes.set_xlim(0, span)
    axes.set_title(str(simulation), fontsize=8)
    used = {action.kind for line in simulation.lines for action, _, _ in line} & COMPUTE
    handles = [axes.barh(0, 0, color=_COLOURS[kind], label=kind.value) for kind in _COLOURS if kind in used]
    figure.legend(handles=handles, fontsize=7, ncols=4, loc="outside lower right")
    figure.savefig(path, dpi=120, format="png")
