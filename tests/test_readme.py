"""Documentation: Python blocks run, commands and links lead to what exists, the API page is what the code says."""

import importlib.util
import re
import shlex
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
TOOLS = ("pip", "uv", "pytest", "ruff")  # that are installed as packages; the project's own are looked into


def by_name(pages):
    return [pytest.param(page, id=page.name) for page in pages]


def imported(path):
    """The module that a file is, with its folder on the path, as when it is run."""
    sys.path.insert(0, str(path.parent))
    try:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module


def parsers():
    """Of the project's own commands."""
    from nsa_jax.train import cli, generate_cli

    files = [f"benchmarks/{name}.py" for name in ("benchmark_nsa", "recall")]
    return {
        "nsa-train": cli._parser(),
        "nsa-generate": generate_cli._parser(),
    } | {file: imported(ROOT / file)._parser() for file in files}


@pytest.mark.parametrize("page", by_name(page for page in PAGES if "```python" in page.read_text()))
def test_python_blocks_run_one_after_the_other(page):
    text, names = page.read_text(), {"__name__": "page"}
    for block in re.finditer(r"^```python\n(.*?)^```", text, re.M | re.S):
        lines_before = text.count("\n", 0, block.start(1))
        exec(compile("\n" * lines_before + block[1], page, "exec"), names)


def commands(text):
    """The commands in a page, as words: in indented or fenced lines, and in inline code."""
    text = re.sub(r"^```python\n.*?^```", "", text, flags=re.M | re.S)
    starts = r"(?:python3?|pip|uv|pytest|compute-sanitizer|nsa-train|nsa-generate|ruff) "
    found = re.findall(rf"^(?: {{4}})?({starts}.*)$", text, re.M) + re.findall(rf"`({starts}[^`]*)`", text)
    for line in found:
        words = shlex.split(line, comments=True)
        while "&&" in words:
            yield words[: words.index("&&")]
            words = words[words.index("&&") + 1 :]
        yield words


def check(words, own):
    """Fails unless a command is one of the project's with options that it has, or a tool with files that there are."""
    if words[:1] in (["python"], ["python3"]) and words[1] == "-m":
        words = words[2:]
    if words[:2] == ["uv", "run"]:
        while words[2] == "--extra":
            assert words[3] in EXTRAS, words
            del words[2:4]
        words = words[2:]
    if words[0] == "compute-sanitizer":
        return check(words[words.index("python") :], own)
    if words[0] in ("python", "python3"):
        assert (ROOT / words[1]).is_file(), words
        words = words[1:]
    if words[0] in own:
        known = [option for action in own[words[0]]._actions for option in action.option_strings]
        assert {word for word in words if word.startswith("-")} <= set(known), words
    elif words[0] == "pip":
        for extra in re.findall(r"\[([\w,]+)\]", " ".join(words)):
            assert set(extra.split(",")) <= set(EXTRAS), words
    else:
        assert words[0] in TOOLS or (ROOT / words[0]).is_file(), words
        for word in words:
            assert "/" not in word or (ROOT / word).exists(), words


@pytest.mark.parametrize("page", by_name(PAGES))
def test_commands_can_be_given_as_they_stand(page):
    text, own = page.read_text(), parsers()
    for words in commands(text):
        check(words, own)
    options = {option for parser in own.values() for action in parser._actions for option in action.option_strings}
    assert {found.split()[0] for found in re.findall(r"`(--[a-z][^`=]*)", text)} <= options


@pytest.mark.parametrize(
    "command", ["nsa-train --stepz 3", "python nowhere.py", 'pip install ".[cuda7]"', "uv run a/b"]
)
def test_a_wrong_command_is_found(command):
    with pytest.raises((AssertionError, SystemExit)):
        check(shlex.split(command), parsers())


def test_api_page_is_up_to_date():
    page = (ROOT / "docs" / "api.md").read_text()
    assert page == imported(ROOT / "docs" / "write_api.py").page(page), "python docs/write_api.py writes it anew"


@pytest.mark.parametrize("page", by_name(PAGES))
def test_relative_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target
