"""What has a table for rich is printed as one by plain `print`, too."""

from __future__ import annotations

from typing import Any

_COLUMNS = 130


class Shown:
    """A class with `__rich__`; `str()` of it is that, without colours."""

    def __rich__(self) -> Any:
        raise NotImplementedError

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=_COLUMNS, color_system=None)
        with console.capture() as capture:
            console.print(self.__rich__())
        return capture.get()
