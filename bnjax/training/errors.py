"""The one error a person can put right, and how it reaches them."""

import contextlib
import difflib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator

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


def did_you_mean(given: str, choices: Iterable[str]) -> str:
    """Return a sentence naming the choice closest to `given`, or nothing.

    Example:
        >>> did_you_mean("mnits", ["digits", "mnist"])
        " Did you mean 'mnist'?"
        >>> did_you_mean("xyz", ["digits", "mnist"])
        ''
    """
    near = difflib.get_close_matches(given, list(choices), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def first_line(error: BaseException) -> str:
    r"""Return what another library's error says, in one line.

    Example:
        >>> first_line(ValueError("no such file\n\nTraceback: ..."))
        'no such file'
        >>> first_line(EOFError())
        'EOFError'
    """
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextlib.contextmanager
def interrupts_held() -> Iterator[None]:
    """Let Ctrl-C wait for the end of what must not be left half done.

    Example:
        >>> with interrupts_held():
        ...     print("written whole")
        written whole
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: asked.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if asked:
        raise KeyboardInterrupt


def run_reporting(main: Callable[[], None]) -> int:
    """Run `main` and turn what a person can put right into one line on stderr.

    Returns:
        The exit status: 0, that of the `UserError`, or 130 after Ctrl-C.
    """
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.status
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
