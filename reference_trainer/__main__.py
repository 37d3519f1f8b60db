"""``python -m reference_trainer``."""

import sys

try:
    from reference_trainer.cli import main
except ModuleNotFoundError as error:
    if error.name not in ("pydantic", "typer"):
        raise
    sys.exit(
        f"error: the reference trainer needs {error.name}; "
        "install it with: pip install gradguard[trainer]"
    )

if __name__ == "__main__":
    main()
