"""The commands, flags and messages on the pages are those of the programs."""

import ast
import functools
import inspect
import re
import shlex
from pathlib import Path

import pytest
import tyro

from bnjax.cli import COMMANDS, parse_train
from bnjax.training.config import as_flag, flag_values
from bnjax.training.presets import PRESETS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`([^`]+)`")
PROGRAM = re.compile(
    r"(?:\w+=\S+ )*(?:python )?(?:(train|eval)\.py|(?:-m )?bnjax(?= [\w-]))(?: |$)"
)
# What stands for a word of the reader's own, where not every word would do.
PLACEHOLDERS = {"PRESET": "mnist", "COMMAND": "predict", "N": "2"}


def command_lines(text):
    """Return the shell lines of a page, and its inline code, each on one line."""
    lines = []
    for language, block in FENCE.findall(text):
        if language in ("sh", "bash", "console"):
            for line in re.sub(r"\\\n\s*", "", block).splitlines():
                lines += line.removeprefix("$ ").split(" && ")
    return [*lines, *inline_code(text)]


def inline_code(text):
    return [" ".join(code.split()) for code in INLINE.findall(FENCE.sub("", text))]


def documented():
    """Return the words of each command, its name first, by where it is."""
    found = {}
    for page in PAGES:
        for line in command_lines(page.read_text("utf-8")):
            plain = re.sub(r"(?<=[A-Z])\.\.\.", "", line).strip()
            match = PROGRAM.match(plain)
            # The name of a program is no command line.
            if match and (plain.startswith("python ") or " " in plain):
                words = shlex.split(plain[match.end() :], comments=True)
                words = [PLACEHOLDERS.get(word, word) for word in words]
                where = f"{page.relative_to(ROOT)}: {line.strip()}"
                found[where] = [*filter(None, [match[1]]), *words]
    return found


def known_flags():
    """Return every flag of train.py and of the commands, also as `--no-...`."""
    fields = list(flag_values(PRESETS["mnist"].config))
    for command in COMMANDS.values():
        fields += inspect.signature(command).parameters
    flags = {"--help", "--lr", "--model", *map(as_flag, fields)}
    for flag in map(as_flag, fields):
        group, dot, name = flag.removeprefix("--").rpartition(".")
        flags.add(f"--{group}{dot}no-{name}")
    return flags


def parse(name, words):
    """Read the words as the command does, without running it."""
    if name == "train":
        return parse_train(words)
    flags = []
    if name == "import-torch" and "--" in words:
        place = words.index("--")
        words, flags = words[:place], words[place + 1 :]

    @functools.wraps(COMMANDS[name])
    def stand_in(*_, **given):
        return given

    given = tyro.cli(stand_in, args=words)
    if name == "import-torch":
        model = ["--model", given["model"]] if given["model"] else []
        parse_train([given["preset"], *model, *flags])
    return given


def check(words):
    name, *rest = words
    if words in (["--help"], ["--version"]):
        return
    assert name in COMMANDS
    if rest[-1:] == ["--help"]:
        assert not rest[:-1] or (name == "train" and rest[0] in PRESETS)
    elif len(rest) == 1 and rest[0].startswith("--"):
        # Prose names a flag with its program, such as `train.py --init-from`.
        assert rest[0] in known_flags()
    elif rest or name == "train":
        parse(name, rest)


DOCUMENTED = documented()


@pytest.mark.parametrize("where", DOCUMENTED)
def test_a_documented_command_is_one_that_the_programs_take(where):
    check(DOCUMENTED[where])


def test_commands_are_found_in_readme_and_docs():
    pages = {where.partition(":")[0] for where in DOCUMENTED}
    assert {"README.md", "docs/programs/training.md", "docs/library/doctor.md"} <= pages
    assert {words[0] for words in DOCUMENTED.values()} >= set(COMMANDS)


@pytest.mark.parametrize(
    "words",
    [
        "train --no-such-flag",
        "train no-such-preset",
        "train mnist --bn.sync sometimes",
        "eval RUN --crop 10",
        "predict RUN photos --best 3",
        "import-torch w.pt --preset mnist --output runs/a -- --no-such-flag",
        "no-such-command RUN",
    ],
)
def test_a_command_that_the_programs_do_not_take(words):
    with pytest.raises((SystemExit, ValueError, AssertionError)):
        check(words.split())


def test_every_flag_on_the_pages_of_the_programs_exists():
    known = known_flags()
    # `--data.*` and `--bn` name groups of flags.
    groups = {flag.partition(".")[0] for flag in known if "." in flag}
    for page in sorted((ROOT / "docs/programs").glob("*.md")):
        for code in inline_code(page.read_text("utf-8")):
            if code.startswith(("python -m experiments", "python -m bench", "tensor")):
                continue
            for flag in re.findall(r"(?<!\S)--[\w.-]+", code):
                assert flag in known or flag.rstrip(".") in groups, (page.name, code)


def test_every_message_on_the_pages_of_the_programs_is_one_of_theirs():
    told = set()
    for path in (ROOT / "bnjax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                told.add(node.value)
    for page in sorted((ROOT / "docs/programs").glob("*.md")):
        _, *tables = page.read_text("utf-8").split("| message | what to do |\n")
        for table in tables:
            rows = table.partition("\n\n")[0].splitlines()[1:]
            assert all(INLINE.search(row) for row in rows)
            first_cells = "\n".join(row.split(" | ")[0] for row in rows)
            for message in INLINE.findall(first_cells):
                # The values in a message are examples, and this is grain's.
                values = r"Worker process was terminated|\.\.\.|'[^']*'|\d+|nan|[:;,]"
                for part in re.split(values, message):
                    words = re.sub(r"^\W*--\w+$", "", part).strip()
                    assert any(words in text for text in told), (page.name, message)
