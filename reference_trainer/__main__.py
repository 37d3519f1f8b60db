"""``python -m reference_trainer``."""

from reference_trainer.cli import main

if __name__ == "__main__":
    main()
