"""``python -m gradguard``, also installed as ``gradguard``.

Exit status: 0 when nothing was found, 1 when something was, 2 when it cannot be said; then standard error
says why, in one sentence.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from gradguard.commands import UNUSABLE, CommandError, parse
from gradguard.engine import UnknownRuleError
from gradguard.views.wording import one_line


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    Args:
        argv: what stands after the program's name; that of the process when None.
    """
    try:
        options = parse(argv)
        status: int = options.command(options)
        sys.stdout.flush()
    except SystemExit as done:  # argparse, after --help and --version
        return int(done.code or 0)
    except (CommandError, UnknownRuleError) as error:
        sys.stderr.write(f"error: {one_line(str(error))}\n")
        return UNUSABLE
    except BrokenPipeError:  # the reader of a pipe has gone: nobody is left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return UNUSABLE
    return status


if __name__ == "__main__":
    sys.exit(main())
