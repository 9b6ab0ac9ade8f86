"""Every public name has an entry in the API reference, and every entry a name."""

import ast
import dataclasses
import importlib
import inspect
import pkgutil
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import bnjax

PAGES = Path(__file__).parents[2] / "docs" / "api"
# They serve the programs, and promise no stable interface.
PROGRAMS = {"__main__", "cli", "data", "report", "training"}
# Entries that a page describes itself, and the ones that autodoc reads from the code.
ENTRY = re.compile(r"^\.\. (?:py:|auto)(function|class|exception|data):: ([\w.]+)$")
OPTION = re.compile(r"^   :members: (.+)$")
CURRENT = re.compile(r"^\.\. currentmodule:: ([\w.]+)$")
SECTION = re.compile(r"^(\w+):$", re.MULTILINE)
ITEM = re.compile(r"^    (\*{0,2}\w+): ", re.MULTILINE)


def public_names(module: ModuleType) -> list[str]:
    """Return the names of `__all__`, or of definitions and `import x as x`."""
    if hasattr(module, "__all__"):
        return list(module.__all__)
    names: list[str] = []
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.ImportFrom):
            names += [alias.name for alias in node.names if alias.asname == alias.name]
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names += [target.id for target in targets if isinstance(target, ast.Name)]
    return [name for name in names if not name.startswith("_")]


def public_modules() -> dict[str, ModuleType]:
    """Return the stable modules, without files that a package takes names from."""
    found = {"bnjax": bnjax}
    for info in pkgutil.walk_packages(bnjax.__path__, "bnjax."):
        parts = info.name.split(".")[1:]
        if parts[0] in PROGRAMS or any(part.startswith("_") for part in parts):
            continue
        module = importlib.import_module(info.name)
        if info.ispkg or len(parts) == 1 or hasattr(module, "__all__"):
            found[info.name] = module
    return found


@dataclasses.dataclass
class Entry:
    """An entry of a page.

    Attributes:
        page: name of the file.
        module: that the entry is in.
        kind: of the directive, such as "function".
        name: in the module.
        members: that the entry shows.
    """

    page: str
    module: str
    kind: str
    name: str
    members: list[str]


def read_entries() -> list[Entry]:
    entries: list[Entry] = []
    for page in sorted(PAGES.glob("*.md")):
        module = ""
        for line in page.read_text("utf-8").splitlines():
            if match := CURRENT.match(line):
                module = match[1]
            elif match := ENTRY.match(line):
                entries.append(Entry(page.name, module, match[1], match[2], []))
            elif match := OPTION.match(line):
                entries[-1].members += match[1].split(", ")
    return entries


ENTRIES = read_entries()
MODULES = public_modules()


def objects() -> dict[str, Any]:
    """Return the functions and classes of the entries, and the members shown."""
    found: dict[str, Any] = {}
    for entry in ENTRIES:
        value = getattr(importlib.import_module(entry.module), entry.name)
        if entry.kind == "data":
            continue
        name = f"{entry.module}.{entry.name}"
        found[name] = value
        for member in entry.members:
            found[f"{name}.{member}"] = inspect.getattr_static(value, member)
    return found


def items(docstring: str, section: str) -> list[str] | None:
    """Return the names in a section, such as Args; None without the section."""
    _, *parts = SECTION.split(inspect.cleandoc(docstring))
    sections = dict(zip(parts[::2], parts[1::2], strict=True))
    return ITEM.findall(sections[section]) if section in sections else None


def parameters(value: Any) -> list[str]:
    """Return the parameters that a caller may pass, with the stars of the rest."""
    if isinstance(value, classmethod | staticmethod):
        value = value.__func__
    if inspect.isclass(value):
        value = vars(value).get("__init__", value.__init__)
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    signature = inspect.signature(value, follow_wrapped=True)
    return [
        stars.get(parameter.kind, "") + name
        for name, parameter in signature.parameters.items()
        if name not in ("self", "cls")
    ]


def fields(kind: type) -> list[str]:
    """Return the public fields of a dataclass or a named tuple."""
    if dataclasses.is_dataclass(kind):
        names = [field.name for field in dataclasses.fields(kind)]
    else:
        names = list(getattr(kind, "_fields", kind.__annotations__))
    return [name for name in names if not name.startswith("_")]


def test_every_public_name_is_on_a_page():
    shown = {(entry.module, entry.name) for entry in ENTRIES}
    missing = [
        f"{name}.{each}"
        for name, module in MODULES.items()
        if name != "bnjax.functional"
        for each in public_names(module)
        if (name, each) not in shown
    ]
    assert not missing


def test_bnjax_has_the_names_of_functional():
    names = public_names(bnjax)
    assert sorted(bnjax.functional.__all__) == sorted(names)
    assert all(getattr(bnjax, n) is getattr(bnjax.functional, n) for n in names)


def test_every_entry_is_a_public_name_and_stands_once():
    seen = [(entry.module, entry.name) for entry in ENTRIES]
    assert len(set(seen)) == len(seen)
    for module, name in seen:
        assert module in MODULES, f"{module}.{name}: no public module"
        assert name in public_names(MODULES[module]), f"{module}.{name} is not public"


def test_every_member_of_an_entry_exists():
    assert objects()


@pytest.mark.parametrize("name", [n for n in MODULES if n != "bnjax.functional"])
def test_every_public_module_has_a_page(name):
    page = name.split(".")[1] if "." in name else "bnjax"
    text = (PAGES / f"{page}.md").read_text("utf-8")
    assert f".. automodule:: {name}\n   :no-members:\n" in text


def test_the_index_lists_every_page():
    text = (PAGES / "index.md").read_text("utf-8")
    pages = sorted(page.stem for page in PAGES.glob("*.md") if page.stem != "index")
    assert sorted(re.findall(r"\]\((\w+)\.md\)", text)) == pages
    assert sorted(text.partition(":hidden:")[2].strip("\n`").split()) == pages


@pytest.mark.parametrize("name", objects())
def test_docstring(name):
    value = objects()[name]
    doc = value.__doc__
    assert doc
    assert doc.strip()
    for section, known in (("Args", parameters), ("Attributes", fields)):
        listed = items(doc, section)
        if listed is None:
            continue
        expected = known(value)
        # A layer may refer to the layer that it extends for what both have.
        if re.search(r"The other\s+(arguments|attributes)", doc):
            expected = [each for each in expected if each in listed]
        assert listed == expected, f"{section} differ from the code"


def test_a_section_is_compared_by_name_and_order():
    def function(x, *, axis=-1, **options):
        """Do something.

        Args:
            x: input, such as
                other: than this.
            axis: of `x`.
            **options: of another function.

        Returns:
            y: the output.
        """

    listed = ["x", "axis", "**options"]
    assert items(function.__doc__, "Args") == parameters(function) == listed
    assert items(function.__doc__, "Attributes") is None
