"""``python -m reference_trainer.hpo``."""

import sys

_EXTRAS = {"optuna": "hpo", "sqlalchemy": "hpo", "pydantic": "trainer", "typer": "trainer"}

try:
    from reference_trainer.search.cli import main
except ModuleNotFoundError as error:
    if error.name not in _EXTRAS:
        raise
    sys.exit(
        f"error: the search needs {error.name}; "
        f'install it with: pip install "gradguard[{_EXTRAS[error.name]}]"'
    )

if __name__ == "__main__":
    main()
