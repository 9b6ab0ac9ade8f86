"""Elements of an HTML page as a tree, so that text can never become a tag."""

import json
import math
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any


def tag(kind: str, /, *parts: Any, **attributes: str) -> ET.Element:
    """Return an element; parts are text, elements, or dicts of more attributes."""
    element = ET.Element(kind, attributes)
    for part in parts:
        if isinstance(part, dict):
            element.attrib |= part
        elif isinstance(part, str):
            element.text = (element.text or "") + clean(part)
        else:
            element.append(part)
    return element


def table(
    caption: str,
    header: Sequence[str],
    rows: Iterable[Sequence[Any]],
    *,
    prose: Sequence[int] = (),
) -> ET.Element:
    """Return a table that scrolls by itself; its first column names the rows."""
    body = [
        tag(
            "tr",
            *(
                tag("td", str(cell), {"class": "prose"} if place in prose else {})
                if place
                else tag("th", str(cell), scope="row")
                for place, cell in enumerate(row)
            ),
        )
        for row in rows
    ]
    inner = tag(
        "table",
        tag("caption", caption),
        tag("thead", tag("tr", *(tag("th", name, scope="col") for name in header))),
        tag("tbody", *body),
    )
    # A keyboard can scroll only an element that it can focus.
    label = {"aria-label": caption}
    return tag("div", inner, label, {"class": "wide"}, role="region", tabindex="0")


def clean(text: str) -> str:
    """Return text without the characters that are invalid in a page."""
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)


def text(value: Any) -> str:
    """Return a value as the text of a cell."""
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value, default=str)


def percent(value: float) -> str:
    """Return a fraction as a percentage."""
    return f"{100 * value:.2f} %"


def duration(seconds: float) -> str:
    """Return seconds in a form for people."""
    if not math.isfinite(seconds) or seconds < 0:
        return "-"
    if seconds < 60:
        return f"{seconds:.1f} s"
    return str(timedelta(seconds=round(seconds)))
