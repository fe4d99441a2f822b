"""The frame of the report: one HTML file that loads nothing, light and dark."""

from __future__ import annotations

import html

from .style import STYLE

BRAND = (
    '<div class="brand"><svg viewBox="0 0 34 18" aria-hidden="true"><path d="M9 3'
    "a6 6 0 1 0 0 12c6 0 10-12 16-12a6 6 0 1 1 0 12"
    'c-2.6 0-4.8-2.2-7-5M9 3c2.6 0 4.8 2.2 7 5"/></svg>moebius</div>'
)


def escape(text: object) -> str:
    """Text that is safe between tags."""
    return html.escape(str(text))


def page(title: str, body: str) -> str:
    """A whole document."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{BRAND}\n{body}\n</main>\n</body>\n</html>\n"
    )


def card(value: str, label: str, style: str = "") -> str:
    """A number that matters."""
    return f'<div class="card"><b class="{style}">{escape(value)}</b><span>{escape(label)}</span></div>'


def section(title: str, note: str, *content: str) -> str:
    """A titled part."""
    return f'<section><h2>{escape(title)}</h2><p class="note">{escape(note)}</p>{"".join(content)}</section>'


def legend(entries: list[tuple[str, str]]) -> str:
    """(style, name) of each colour."""
    return (
        '<ul class="legend">' + "".join(f'<li><i class="{s}"></i>{escape(name)}</li>' for s, name in entries) + "</ul>"
    )


def facts(entries: list[tuple[str, str]]) -> str:
    """Names and values; values may hold markup."""
    return "<dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{value}</dd>" for name, value in entries) + "</dl>"
