"""The one-page reference: what ``explain`` says of every registered part."""

from __future__ import annotations

from robustlab import __version__
from robustlab.registry import FOLDERS, entries, plural
from robustlab.report.explain import explain
from robustlab.report.page import render


def reference_page(width: int = 110) -> str:
    """All parts of all kinds as one HTML page, with a search field; ``width`` is that of the texts, in characters."""
    kinds = [
        {
            "plural": plural(kind),
            "parts": [{"name": name, "id": f"{kind}-{name}", "text": explain(cls, width)} for name, cls in entries(kind).items()],
        }
        for kind in FOLDERS
        if entries(kind)
    ]
    total = sum(len(k["parts"]) for k in kinds)
    return render("reference.html.j2", title="robustlab: every part", kinds=kinds, total=total, version=__version__)
