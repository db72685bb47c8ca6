"""Sphinx extension: drop a script that Jupyter Book 1 adds to every page twice."""

from __future__ import annotations

from typing import Any


def setup(app: Any) -> dict[str, bool]:
    """Connect after everybody else has added scripts."""
    app.connect("html-page-context", drop_repeated_scripts, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def drop_repeated_scripts(
    app: Any, page: str, template: str, context: dict[str, Any], doctree: Any
) -> None:
    """Keep the first of several equal scripts.

    sphinx-thebe is set up twice, and its second ``const THEBE_JS_URL = ...`` is a syntax error in
    every browser's console.
    """
    seen: set[str] = set()
    kept = []
    for script in context.get("script_files", []):
        body = getattr(script, "attributes", {}).get("body", "")
        if body and body in seen:
            continue
        seen.add(body)
        kept.append(script)
    context["script_files"] = kept
