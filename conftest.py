"""Leave out the adapters and pages whose packages are not installed."""

import importlib.util

SHARED_PAGE = "docs/library/equinox-haiku.md"
FRAMEWORKS = {
    "equinox": ["bnjax/equinox.py", "docs/coming-from/equinox.md", SHARED_PAGE],
    "haiku": ["bnjax/haiku.py", "docs/coming-from/haiku.md", SHARED_PAGE],
    "jax2onnx": ["bnjax/interop/onnx.py", "docs/library/onnx.md"],
    "onnxruntime": ["bnjax/interop/onnx.py", "docs/library/onnx.md"],
}

collect_ignore = ["docs/conf.py"]
for name, paths in FRAMEWORKS.items():
    if importlib.util.find_spec(name) is None:
        collect_ignore += paths
