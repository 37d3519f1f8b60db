"""``python -m reference_trainer.hpo``."""

import sys

_EXTRAS = {"optuna": "hpo", "sqlalchemy": "hpo", "pydantic": "trainer", "typer": "trainer"}

try:
    from reference_trainer.search.cli import main
except ModuleNotFoundError as error:
    library = (error.name or "").partition(".")[0]
    if library not in _EXTRAS:
        raise
    sys.exit(
        f"error: the search needs {library}; "
        f'install it with: pip install "gradguard[{_EXTRAS[library]}]"'
    )

if __name__ == "__main__":
    main()
