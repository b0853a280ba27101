"""Matplotlib's SVG made fit to stand inside a page, in either theme."""

from __future__ import annotations

import re

from markupsafe import Markup, escape

from dskd_lightning.comparison.report.plots import INK, RULE, Plot

__all__ = ["inline_svg"]


def inline_svg(plot: Plot) -> Markup:
    """The plot as an ``<svg>`` element: scalable, themed, named, with ids of its own."""
    svg = plot.svg[plot.svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    head, _, body = svg.partition(">")
    view_box = re.search(r'viewBox="([\d. -]+)"', head)
    assert view_box is not None, "matplotlib always writes a viewBox"
    # Run names are text nodes, where quotes stand unescaped: only tags may be rewritten.
    body = re.sub(r"<[^>]*>", lambda tag: _rewrite(tag[0], plot.name), body)
    opening = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{view_box[1]}" role="img" aria-label="{escape(plot.caption)}">'
    )
    return Markup(opening + body)


def _rewrite(tag: str, prefix: str) -> str:
    if tag.startswith("<!--"):
        return ""
    tag = re.sub(r'\bid="', f'id="{prefix}-', tag)
    tag = re.sub(r'href="#', f'href="#{prefix}-', tag)
    tag = tag.replace("url(#", f"url(#{prefix}-")
    tag = tag.replace(INK, "var(--ink)").replace(RULE, "var(--rule)")
    return re.sub(r"fill: (#ffffff|white)\b", "fill: none", tag)
