"""What an installed bnjax holds, tried outside the checkout.

    cd SOMEWHERE && /path/to/venv/bin/python /path/to/checkout/tests/installed.py

The interpreter is one where `pip install CHECKOUT` was run and nothing else.
"""

import doctest
import subprocess
import sys
import warnings
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
PAGES = "README.md", "docs/getting-started.md"


def main() -> int:
    # The folder of this script would make the checkout's tests importable.
    sys.path.pop(0)
    warnings.simplefilter("error")
    import bnjax

    package = Path(bnjax.__file__).parent
    if package.is_relative_to(CHECKOUT):
        print(f"bnjax is imported from the checkout, {package}: install it, not -e")
        return 1
    git = "git", "-C", str(CHECKOUT), "ls-files", "bnjax"
    files = subprocess.run(git, check=True, capture_output=True, text=True).stdout
    missing = [name for name in files.split() if not (package.parent / name).is_file()]
    print(f"{package}: {len(files.split())} files, missing {missing or 'none'}")
    failed = 0
    for page in PAGES:
        result = doctest.testfile(
            str(CHECKOUT / page),
            module_relative=False,
            optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE,
        )
        print(f"{page}: {result.attempted} examples, {result.failed} failed")
        failed += result.failed
    return int(bool(missing or failed))


if __name__ == "__main__":
    sys.exit(main())
