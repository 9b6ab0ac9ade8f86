"""Leave out the adapters whose framework is not installed, and their pages."""

import importlib.util

SHARED_PAGE = "docs/library/equinox-haiku.md"
FRAMEWORKS = {
    "equinox": ["bnjax/equinox.py", "docs/coming-from/equinox.md", SHARED_PAGE],
    "haiku": ["bnjax/haiku.py", "docs/coming-from/haiku.md", SHARED_PAGE],
}

collect_ignore = [
    path
    for name, paths in FRAMEWORKS.items()
    if importlib.util.find_spec(name) is None
    for path in paths
]
