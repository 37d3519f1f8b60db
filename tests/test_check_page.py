"""The page about the command line shows what the command line says."""

from __future__ import annotations

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_outputs_on_the_page_are_fresh() -> None:
    """Running the page's own code and commands again gives the page."""
    spec = importlib.util.spec_from_file_location("check_page", ROOT / "docs" / "generate_check.py")
    assert spec is not None
    assert spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    assert generate.PAGE.read_text(encoding="utf-8") == generate.page()
