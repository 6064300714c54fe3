"""Tokens on the colour of their scores, as an image that stays in a saved notebook.

Each token stands on a light ground of its own in dark letters, so that a dark page changes nothing. The image is an SVG
in base64: no script runs in it, and what a prompt holds is text there, never markup.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape

from jupyter_llmcloud.core.explain.tokens import columns, placed, strengths, visible
from jupyter_llmcloud.protocol.explanation import Attribution

COLUMNS = 104
MAX_ROWS = 12  # answers that are drawn
MAX_TOKENS = 600  # of all answers together, so that the cell stays small: the last ones of each
INK, NEUTRAL, FOR, AGAINST = "#16202b", "#e9edf1", "#ff9d3c", "#6fb0ff"
_CHAR, _LINE, _BOX = 7.8, 25, 20
_LEFT = 20  # columns for what is explained
_GREY = "#6a7683"


def mixed(strength: float) -> str:
    """The colour of a score between -1 and 1."""
    target = FOR if strength > 0 else AGAINST
    share = min(1.0, abs(strength)) ** 0.7
    parts = [
        round(int(NEUTRAL[at : at + 2], 16) * (1 - share) + int(target[at : at + 2], 16) * share) for at in (1, 3, 5)
    ]
    return "#" + "".join(f"{part:02x}" for part in parts)


def tokens_image(parts: Sequence[Attribution]) -> str:
    """The `<img>` of all answers, one below the other."""
    drawn, top = [], 4.0
    most = max(24, MAX_TOKENS // min(len(parts), MAX_ROWS))
    for part in parts[:MAX_ROWS]:
        lines, height = _answer(part, top, most)
        drawn += lines
        top += height + 10
    width = round((_LEFT + COLUMNS) * _CHAR + 16)
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{top:.0f}" viewBox="0 0 {width} {top:.0f}" '
        f'font-family="ui-monospace,Menlo,Consolas,monospace" font-size="13" fill="{INK}">{"".join(drawn)}</svg>'
    )
    return _image("image/svg+xml", base64.b64encode(svg.encode()).decode(), _alt(parts))


def pixels_image(part: Attribution) -> str:
    """The `<img>` of an image beside itself under its scores."""
    if not part.picture:
        return ""
    return _image("image/png", part.picture, f"The input, and beside it its pixels by their scores for {part.answer}")


def _image(kind: str, data: str, alt: str) -> str:
    return f'<img alt="{escape(alt, quote=True)}" src="data:{kind};base64,{data}" style="max-width:100%">'


def _alt(parts: Sequence[Attribution]) -> str:
    told = []
    for part in parts[:MAX_ROWS]:
        scored = ", ".join(
            f"{visible(token)} {score:+.3g}" for token, score in zip(part.tokens[:40], part.scores, strict=False)
        )
        told.append(f"{visible(part.answer) if part.answer else part.quantity}: {scored}")
    return "; ".join(told)[:2000]


def _answer(part: Attribution, top: float, most: int) -> tuple[list[str], float]:
    """One answer at the left, and the tokens with their scores; how high that is."""
    hidden = max(0, len(part.tokens) - most)
    shown = placed(part.tokens[hidden:], COLUMNS)
    colours = strengths(part.scores)
    drawn = [_box(0, top, _LEFT - 3, visible(part.answer) if part.answer else part.quantity, "#ffffff", _GREY)]
    if part.probability is not None:
        drawn.append(_plain(0, top + _LINE, f"{part.probability:.0%}"))
    begin = top
    if hidden:
        drawn.append(_plain(_LEFT * _CHAR, top, f"{hidden} tokens before these are not drawn …"))
        begin += _LINE
    for token in shown:
        number = hidden + token.number
        edge = _GREY if number >= part.num_given > 0 else ""
        place = (_LEFT + token.column) * _CHAR, begin + _LINE * token.line
        drawn.append(_box(*place, token.width, token.text, mixed(colours[number]), edge))
    num_lines = bool(hidden) + (shown[-1].line + 1 if shown else 1)
    return drawn, max(num_lines, 1 if part.probability is None else 2) * _LINE


def _box(x: float, y: float, width: int, text: str, fill: str, edge: str = "") -> str:
    text = text if columns(text) <= width else f"{text[: width - 1]}…"
    border = f' stroke="{edge}"' if edge else ""
    length = min(width, columns(text)) * _CHAR
    return (
        f'<rect x="{x + 2:.0f}" y="{y:.0f}" width="{width * _CHAR + 4:.0f}" height="{_BOX}" fill="{fill}"{border}/>'
        f'<text x="{x + 4:.0f}" y="{y + 14:.0f}" textLength="{length:.0f}">{escape(text)}</text>'
    )


def _plain(x: float, y: float, text: str) -> str:
    return f'<text x="{x + 4:.1f}" y="{y + 13:.1f}" fill="{_GREY}" font-size="12">{escape(text)}</text>'
