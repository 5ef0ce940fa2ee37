"""What has a table for rich is printed as one by plain `print`, too."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

_COLUMNS = 130


class Shown(ABC):
    """A class with `__rich__`; `str()` of it is that, without colours."""

    @abstractmethod
    def __rich__(self) -> Any:
        """Something that rich prints."""

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=_COLUMNS, color_system=None)
        with console.capture() as capture:
            console.print(self.__rich__())
        return capture.get()
