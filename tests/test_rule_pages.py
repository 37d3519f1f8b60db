"""Every rule has its generated page, and the pages are fresh."""

from __future__ import annotations

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_every_rule_has_a_fresh_page() -> None:
    """The pages on disk are exactly those that a fresh generation makes."""
    spec = importlib.util.spec_from_file_location("rules", ROOT / "docs" / "generate_rules.py")
    assert spec is not None
    assert spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    on_disk = {path.name: path.read_text(encoding="utf-8") for path in generate.FOLDER.glob("*.md")}
    assert on_disk == generate.pages()
