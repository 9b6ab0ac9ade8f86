"""The one error a person can put right, and how it reaches them."""

import os
import sys
from collections.abc import Callable

from bnjax._cpu.build import BuildError

USAGE = 2
INTERRUPTED = 130
BROKEN_PIPE = 141


class UserError(Exception):
    """Something the person running the program can put right.

    The message says what was given, what was expected and what to do.

    Args:
        message: what to print after "error: ".
        status: the exit status; 2 is for a wrong command line.
    """

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


class DivergedError(UserError):
    """The numbers of a run are no longer finite."""


class Stopped(Exception):  # noqa: N818 (nothing went wrong)
    """A signal stopped the run, which has been saved.

    Args:
        message: what to print.
        status: the exit status, 128 and the signal's number.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def first_line(error: BaseException) -> str:
    r"""Return what another library's error says, in one line.

    Example:
        >>> first_line(ValueError("no such file\n\nTraceback: ..."))
        'no such file'
        >>> first_line(EOFError())
        'EOFError'
    """
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def run_reporting(main: Callable[[], None]) -> int:
    """Run `main` and turn what a person can put right into one line on stderr.

    Returns:
        The exit status: 0, that of the `UserError` or of the signal.
    """
    try:
        main()
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return stopped.status
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.status
    except BuildError as error:
        print("error:", *str(error).split(), file=sys.stderr)
        return 1
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
    return 0
