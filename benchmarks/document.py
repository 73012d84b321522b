"""A report as a list of blocks, written as Markdown or as a self-contained HTML page."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, field

from tables import table


@dataclass(frozen=True)
class Heading:
    """A second-level heading."""

    text: str


@dataclass(frozen=True)
class Text:
    """A paragraph of plain text."""

    text: str


@dataclass(frozen=True)
class Listing:
    """A bulleted list."""

    lines: Sequence[str]


@dataclass(frozen=True)
class Table:
    """A table. Columns in `left` are left-aligned. `folded`: title of a collapsed block in HTML."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: Sequence[int] = (0,)
    folded: str = ""


@dataclass(frozen=True)
class Plot:
    """A plot as SVG and PNG, with its file name and caption."""

    name: str
    caption: str
    svg: str = field(repr=False)
    png: bytes = field(repr=False)


Block = Heading | Text | Listing | Table | Plot


@dataclass(frozen=True)
class Document:
    """A title and the blocks of a report."""

    title: str
    blocks: Sequence[Block]

    @property
    def plots(self) -> list[Plot]:
        """The plots, in order."""
        return [block for block in self.blocks if isinstance(block, Plot)]


def markdown(document: Document, plots: str = "plots") -> str:
    """Render as Markdown, with links to the plots in the folder `plots`."""
    parts = [f"# {document.title}"]
    for block in document.blocks:
        match block:
            case Heading():
                parts.append(f"## {block.text}")
            case Text():
                parts.append(block.text)
            case Listing():
                parts.append("\n".join(f"- {line}" for line in block.lines))
            case Table():
                parts.append(table(block.header, block.rows, block.left))
            case Plot():
                parts.append(f"![{block.caption}]({plots}/{block.name}.svg)\n\n{block.caption}")
    return "\n\n".join(parts) + "\n"


_STYLE = """
:root { color-scheme: light dark; --line: #8884; --dim: #777; --bad: #b3261e; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; padding: 0 1.5rem; }
body { max-width: 90rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .86rem; }
th, td { padding: .22rem .6rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { text-align: left; vertical-align: bottom; position: sticky; top: 0; background: Canvas; }
td.n, th.n { text-align: right; } tr:hover td { background: #8881; }
td.below { color: var(--bad); font-weight: 600; }
figure { margin: 1.2rem 0; } figure svg { max-width: 100%; height: auto; background: #fff; }
figcaption { color: var(--dim); font-size: .9rem; max-width: 60rem; }
details { margin: .8rem 0; } summary { cursor: pointer; font-weight: 600; }
"""


def page(document: Document) -> str:
    """Render as an HTML page with embedded plots and style."""
    title = html.escape(document.title)
    body = "\n".join(_html(block) for block in document.blocks)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n<h1>{title}</h1>\n{body}\n</body>\n</html>\n"
    )


def _html(block: Block) -> str:
    match block:
        case Heading():
            return f"<h2>{html.escape(block.text)}</h2>"
        case Text():
            return f"<p>{html.escape(block.text)}</p>"
        case Listing():
            lines = "".join(f"<li>{html.escape(line)}</li>" for line in block.lines)
            return f"<ul>{lines}</ul>"
        case Table():
            shown = f'<div class="wide">{_html_table(block)}</div>'
            if not block.folded:
                return shown
            return f"<details><summary>{html.escape(block.folded)}</summary>{shown}</details>"
        case Plot():
            drawing = block.svg[block.svg.index("<svg") :]
            caption = html.escape(block.caption)
            return f"<figure>{drawing}<figcaption>{caption}</figcaption></figure>"


def _html_table(block: Table) -> str:
    def line(tag: str, cells: Sequence[str]) -> str:
        done = []
        for i, cell in enumerate(cells):
            names = [] if i in block.left else ["n"]
            names += ["below"] if tag == "td" and _below_one(cell) else []
            marks = f' class="{" ".join(names)}"' if names else ""
            done.append(f"<{tag}{marks}>{html.escape(cell)}</{tag}>")
        return f"<tr>{''.join(done)}</tr>"

    rows = "\n".join(line("td", row) for row in block.rows)
    return f"<table><thead>{line('th', block.header)}</thead><tbody>{rows}</tbody></table>"


def _below_one(cell: str) -> bool:
    """Whether a cell is a ratio below one, such as "0.87x"."""
    number = cell.removesuffix("x")
    try:
        return number != cell and float(number) < 1
    except ValueError:
        return False
