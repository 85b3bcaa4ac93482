"""The table that AITER's file prints at its end."""

from typing import Any


class DataFrame:
    """Rows as dictionaries of the same keys."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def to_markdown(self, *, index: bool) -> str:
        """A table in Markdown, without numbers of rows."""
        assert not index
        names = list(self.rows[0])
        lines = [names, ["---"] * len(names), *[[str(row[name]) for name in names] for row in self.rows]]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)
