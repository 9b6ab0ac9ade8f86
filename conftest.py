"""Leave out the adapters whose framework is not installed, and their page."""

import importlib.util

FRAMEWORKS = {"equinox": "bnjax/equinox.py", "haiku": "bnjax/haiku.py"}
MISSING = [name for name in FRAMEWORKS if importlib.util.find_spec(name) is None]

collect_ignore = [FRAMEWORKS[name] for name in MISSING]
if MISSING:
    collect_ignore.append("docs/library/equinox-haiku.md")
