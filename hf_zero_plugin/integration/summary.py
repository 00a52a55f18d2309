"""The table at the end of a training that ZeroCallback watched: rich in a terminal, HTML in a notebook."""

from __future__ import annotations

import html
import sys
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Summary"]


@dataclass
class Summary:
    """Rows of (what, value). ``display`` shows it where the user is."""

    title: str
    rows: list[tuple[str, str]] = field(default_factory=list)

    def add(self, what: str, value: str | None) -> None:
        if value is not None:
            self.rows.append((what, value))

    def __rich__(self) -> Any:
        from rich.table import Table

        table = Table(title=self.title, title_justify="left", show_header=False)
        table.add_column()
        table.add_column(justify="right")
        for row in self.rows:
            table.add_row(*row)
        return table

    def __str__(self) -> str:
        width = max((len(what) for what, _ in self.rows), default=0)
        return "\n".join([self.title, *(f"  {what:<{width}}  {value}" for what, value in self.rows)])

    def _repr_html_(self) -> str:
        cells = "".join(
            f"<tr><td style='text-align:left'>{html.escape(what)}</td>"
            f"<td style='text-align:right'>{html.escape(value)}</td></tr>"
            for what, value in self.rows
        )
        return f"<table><caption>{html.escape(self.title)}</caption>{cells}</table>"

    def display(self) -> None:
        """HTML in a notebook, a rich table elsewhere."""
        if is_notebook():
            from IPython.display import display

            display(self)
            return
        from rich.console import Console

        Console().print(self)


def is_notebook() -> bool:
    shell = sys.modules.get("IPython")
    current = shell.get_ipython() if shell is not None else None
    return type(current).__name__ == "ZMQInteractiveShell"
