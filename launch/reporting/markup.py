"""HTML elements that several parts of the report's page share."""

import html
from collections.abc import Iterable, Sequence


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "wide") -> str:
    """A table; cells are HTML. A column whose name ends in `>` has numbers, one that ends in `#` has ids or paths."""
    classes = [{">": ' class="n"', "#": ' class="id"'}.get(column[-1:], "") for column in columns]
    head = "".join(f"<th{c}>{html.escape(n.rstrip('>#'))}</th>" for n, c in zip(columns, classes, strict=True))
    lines = ("".join(f"<td{c}>{cell}</td>" for cell, c in zip(row, classes, strict=True)) for row in rows)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="{kind}"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>\n'
