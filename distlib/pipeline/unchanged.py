"""What a recorded run took to stay as it was, and a user may have changed since: compared before each step, for a rank
sees its own stages only, and the others would compute as before."""

from __future__ import annotations

from torch import nn

from distlib.pipeline.stage_module import Container, StageModule


class Unchanged:
    """Of one stage. ghost: the whole model as it is recorded, whose modes are those that every rank knows of.

    watches_parameters: whether the stage has no data-parallel wrapper, which looks after that itself.
    """

    def __init__(self, stage: StageModule, ghost: nn.Module, watches_parameters: bool) -> None:
        recorded = dict(ghost.named_modules(remove_duplicate=False))
        known = [(name, part, recorded[name]) for name, part in stage.named_modules() if name in recorded]
        self._containers = [entry for entry in known if isinstance(entry[1], Container) or entry[1] is stage]
        self._leaves = [entry for entry in known if not (isinstance(entry[1], Container) or entry[1] is stage)]
        named = stage.named_parameters() if watches_parameters else ()
        self._frozen = [(name, parameter) for name, parameter in named if not parameter.requires_grad]

    def require(self) -> None:
        """Raises ValueError, by name, for what the other ranks cannot know of."""
        for name, parameter in self._frozen:
            if parameter.requires_grad:
                raise ValueError(
                    f"{name} is to be trained, and was frozen when the pipeline was made: stages before it would send "
                    "no gradients on. Make the pipeline with requires_grad=True, and freeze it afterwards"
                )
        for name, part, recorded in self._containers:
            if part.training != recorded.training:
                raise ValueError(
                    f"{name or 'the model'} is in {_mode(part)}, and is divided among stages, which took it to be in "
                    f"{_mode(recorded)}: other ranks do not see what is set here. Set it before the pipeline is made, "
                    "or call train() or eval() of the pipeline"
                )
        for name, part, recorded in self._leaves:
            if part.training and not recorded.training:
                raise ValueError(
                    f"{name} is in training mode, and the pipeline took it to be in evaluation mode: its random "
                    "numbers would not be those of one process. Call train() of the pipeline"
                )


def _mode(module: nn.Module) -> str:
    return "training mode" if module.training else "evaluation mode"
