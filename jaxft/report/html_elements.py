"""Elements of a report's page. Every text is escaped here, and nowhere else."""

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files

from jaxft.report.examples import Example

_NUMBER = re.compile(r"[-+\d.,%e: ]*\d[-+\d.,%e: ]*|-?")


def page(title: str, subtitle: Sequence[str], body: Sequence[str], names: Sequence[str]) -> str:
    """Returns the page, with nothing that a browser has to load.

    Args:
      title, subtitle: its heading, and lines below it.
      body: its sections as HTML.
      names: titles of the sections, for the links.
    """
    css = (files("jaxft") / "assets" / "report.css").read_text()
    links = "".join(f'<a href="#{anchor(name)}">{_text(name)}</a>' for name in names)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{_text(title)}</title>\n<style>\n{css}</style>\n</head>\n<body>\n<header>\n"
        f"<h1>{_text(title)}</h1>\n{''.join(map(note, subtitle))}\n<nav>{links}</nav>\n</header>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def section(title: str, *parts: str) -> str:
    """Returns a section; its parts are HTML."""
    content = "\n".join(part for part in parts if part)
    return f'<section id="{anchor(title)}">\n<h2>{_text(title)}</h2>\n{content}\n</section>'


def heading(text: str) -> str:
    """Returns the heading of a part of a section."""
    return f"<h3>{_text(text)}</h3>"


def paragraph(text: str) -> str:
    """Returns a paragraph."""
    return f"<p>{_text(text)}</p>"


def note(text: str) -> str:
    """Returns a paragraph in a soft colour."""
    return f'<p class="note">{_text(text)}</p>'


def preformatted(text: str) -> str:
    """Returns text whose lines stay as they are."""
    return f"<pre>{_text(text)}</pre>"


def tiles(values: Mapping[str, tuple[str, str]]) -> str:
    """Returns large numbers by name, each with a remark that may be empty."""
    cells = [
        f"<div><dt>{_text(name)}</dt><dd>{_text(value)}"
        + (f'<span class="note">{_text(remark)}</span>' if remark else "")
        + "</dd></div>"
        for name, (value, remark) in values.items()
    ]
    return f'<dl class="tiles">{"".join(cells)}</dl>'


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, dim: str = "") -> str:
    """Returns a table. Columns of numbers are aligned at the right.

    Args:
      header: names of the columns.
      rows: cells of each row.
      dim: first cell of rows in a soft colour.
    """
    rows = [tuple(map(str, row)) for row in rows]
    numeric = [
        bool(rows) and all(_NUMBER.fullmatch(row[k]) for row in rows) for k in range(len(header))
    ]
    classes = [' class="number"' * is_numeric for is_numeric in numeric]
    head = "".join(f"<th{c}>{_text(name)}</th>" for c, name in zip(classes, header, strict=True))
    lines = []
    for row in rows:
        cells = "".join(f"<td{c}>{_text(cell)}</td>" for c, cell in zip(classes, row, strict=True))
        soft = ' class="dim"' if dim and row[0] == dim else ""
        lines.append(f"<tr{soft}>{cells}</tr>")
    body = "\n".join(lines)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n{body}</table></div>'


def figure(svg: str, label: str, *, caption: str = "") -> str:
    """Returns a figure from SVG; `label` describes it to readers who cannot see it."""
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{_text(label)}"', 1)
    below = f"<figcaption>{_text(caption)}</figcaption>" if caption else ""
    return f'<figure class="single">{svg}{below}</figure>'


def figures(svgs: Mapping[str, str]) -> str:
    """Returns figures side by side, as far as there is room; labels by name."""
    return f'<div class="figures">{"".join(figure(svg, name) for name, svg in svgs.items())}</div>'


def gallery(examples: Sequence[Example], *, views: bool = False) -> str:
    """Returns pictures with their captions; `views` puts six in each row."""
    cells = []
    for each in examples:
        first, *rest = each.caption
        lines = "".join(f"<span>{_text(line)}</span>" for line in rest)
        cells.append(
            f'<figure><img src="{each.uri}" alt="{_text(" ".join(each.caption))}" width="144" '
            f'height="144"><figcaption><b>{_text(first)}</b>{lines}</figcaption></figure>'
        )
    kind = "gallery views" if views else "gallery"
    return f'<div class="{kind}">{"".join(cells)}</div>'


def anchor(title: str) -> str:
    """Returns the name of a section in links."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def _text(text: str) -> str:
    """Escapes a text; bytes that are not UTF-8 become visible."""
    return escape(text.encode("utf-8", "backslashreplace").decode())
