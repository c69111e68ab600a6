"""Python blocks in the README and in docs/ run; the API page has every public name; links lead to files."""

import importlib
import inspect
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    pytest.param(text, id=f"{page.name}-{number}")
    for page in PAGES
    for number, text in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S))
]


@pytest.mark.parametrize("text", BLOCKS)
def test_python_block_runs(text):
    exec(compile(text, "block", "exec"), {"__name__": "block"})


@pytest.mark.parametrize("module", ["nsa_jax", "nsa_jax.linen", "nsa_jax.nnx"])
def test_api_page_has_every_public_name_with_its_parameters(module):
    public, page = importlib.import_module(module), (ROOT / "docs" / "api.md").read_text()
    for name in public.__all__:
        assert f"### {name}\n" in page
        if callable(getattr(public, name)):
            parameters = ", ".join(inspect.signature(getattr(public, name)).parameters)
            assert f"    {name}({parameters})\n" in page


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_relative_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target
