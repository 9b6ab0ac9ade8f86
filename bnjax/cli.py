"""How an error that a person can put right reaches them: one line, a status."""

import os
import sys
from collections.abc import Callable

USAGE = 2
INTERRUPTED = 130
BROKEN_PIPE = 141


def run_reporting(main: Callable[[], None]) -> int:
    """Run `main` and turn what a person can put right into one line on stderr.

    Returns:
        The exit status: 0, 2 for a setting, 128 and its number for a signal, else 1.
    """
    try:
        main()
    except ValueError as error:
        status = _status(error)
        if status is None:
            raise
        print(f"error: {error}", file=sys.stderr)
        from bnjax.training.hosts import leave_hosts

        leave_hosts(status)
        return status
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("bnjax"):
            raise
        print(
            f"error: the package {error.name} is not installed, and training needs "
            "it: pip install -r requirements.txt, or pip install 'bnjax[train]'.",
            file=sys.stderr,
        )
        return 1
    except BrokenPipeError:
        # Whoever read the output has left; Python would flush to them at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        status = _status(error)
        if status is None:
            raise
        print(error, file=sys.stderr)
        return status
    return 0


def _status(error: Exception) -> int | None:
    """Return the exit status of what a person can put right; None of all else."""
    # Imported here: --help needs none of it.
    from bnjax._cpu.build import BuildError
    from bnjax._files import OutputError
    from bnjax.data.config import DataError, SettingError
    from bnjax.interop.export import ExportError
    from bnjax.interop.torch import TorchError
    from bnjax.training.config import RunError
    from bnjax.training.faults import Stopped

    if isinstance(error, SettingError | OutputError):
        return USAGE
    if isinstance(error, Stopped):
        return 128 + error.signal
    if isinstance(error, DataError | ExportError | TorchError | RunError | BuildError):
        return 1
    return None
