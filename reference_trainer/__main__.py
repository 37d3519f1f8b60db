"""``python -m reference_trainer``."""

import sys

try:
    from reference_trainer.cli import main
except ModuleNotFoundError as error:
    missing = (error.name or "").partition(".")[0]
    if missing not in ("pydantic", "scipy", "typer"):
        raise
    sys.exit(
        f"error: the reference trainer needs {missing}; "
        "install it with: pip install gradguard[trainer]"
    )

if __name__ == "__main__":
    main()
