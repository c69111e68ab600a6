"""Writes docs/api.md anew: all but examples and constants, which it keeps from the page, comes from the code.

python docs/write_api.py
"""

import importlib
import inspect
import re
from pathlib import Path

PAGE = Path(__file__).parent / "api.md"
MODULES = ("nsa_jax", "nsa_jax.linen", "nsa_jax.nnx")  # their public names, in this order
HIDDEN = ("self", "parent", "name")  # parameters, the last two of every linen module
SECTIONS = ("Args", "Attributes", "Returns", "Raises", "Source")


def page(old: str) -> str:
    """The page, with what is written by hand in the old one: its beginning, examples, and all about constants."""
    lines = [re.split(r"^## ", old, maxsplit=1, flags=re.M)[0].rstrip()]
    for module in MODULES:
        public = importlib.import_module(module)
        lines.append(f"## {module}")
        for name in public.__all__:
            lines.append(f"### {name}")
            lines += _entry(name, getattr(public, name), _section(_section(old, module, "##"), name, "###"))
    return "\n\n".join(lines) + "\n"


def _section(text: str, name: str, level: str) -> str:
    """What stands below a heading, up to the next of its level."""
    found = re.search(rf"^{level} {re.escape(name)}\n(.*?)(?=^{level} |\Z)", text, re.M | re.S)
    return found[1].strip() if found else ""


def _entry(name: str, value, old: str) -> list[str]:
    if not callable(value):
        return [old] if old else []
    classes = inspect.getmro(value) if inspect.isclass(value) else (value,)
    texts: dict[str, str] = {}
    for one in reversed(classes):
        doc = _parsed(one.__doc__ or "")
        texts |= doc.get("Attributes", {}) | doc.get("Args", {})
    doc = _parsed(value.__doc__)
    lines = [doc["text"], *_described(name, value, texts, doc)]
    if inspect.isclass(value) and "__call__" in vars(value):
        called = _parsed(value.__call__.__doc__ or "")
        lines += ["Called:", *_described(f"{name}.__call__", value.__call__, called.get("Args", {}), called)]
    return lines + re.findall(r"^```python\n.*?^```", old, re.M | re.S)


def _described(name: str, function, texts: dict[str, str], doc: dict) -> list[str]:
    """The signature, a table of the arguments, and what is said of results."""
    signature = inspect.signature(function)
    parameters = [p for p in signature.parameters.values() if p.name not in HIDDEN]
    lines = [f"    {name}({_listed(parameters)})"]
    if parameters:
        rows = ["| argument | type | default | |", "|---|---|---|---|"]
        for p in parameters:
            default = "" if p.default is p.empty else f"`{_default(p.default)}`"
            rows.append(f"| `{p.name}` | {_type(p.annotation)} | {default} | {texts.get(p.name, '')} |")
        lines.append("\n".join(rows))
    for section in ("Returns", "Raises", "Source"):
        if section in doc:
            lines.append(f"{section}: {doc[section]}")
    return lines


def _listed(parameters) -> str:
    names = [p.name for p in parameters]
    keyword_only = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    if keyword_only:
        names.insert(names.index(keyword_only[0]), "*")
    return ", ".join(names)


def _type(annotation) -> str:
    if annotation is inspect.Parameter.empty:
        return ""
    text = re.sub(r"\b(?:[a-z_]+\.)+(?=[A-Za-z])", "", inspect.formatannotation(annotation))
    text = re.sub(r"^Optional\[(.*)\]$", r"\1 | None", text)
    return f"`{text}`".replace("|", "\\|")


def _default(value) -> str:
    return getattr(value, "__name__", None) or repr(value)


def _parsed(doc: str) -> dict:
    """text: what stands before the sections; Args, Attributes: name -> text; the other sections: their text."""
    blocks = re.split(rf"^({'|'.join(SECTIONS)}):", inspect.cleandoc(doc), flags=re.M)
    parsed: dict = {"text": re.sub(r"\n\nFields are those .*?:$", "", blocks[0].strip(), flags=re.S)}
    for title, body in zip(blocks[1::2], blocks[2::2], strict=True):
        if title in ("Args", "Attributes"):
            parsed[title] = _entries(body)
        else:
            parsed[title] = " ".join(body.split())
    return parsed


def _entries(body: str) -> dict[str, str]:
    entries: dict[str, str] = {}
    for entry in re.split(r"\n(?! )", inspect.cleandoc(body)):
        names, _, text = entry.partition(":")
        for name in re.split(r",\s+", names):
            entries[name.strip()] = " ".join(text.split())
    return entries


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
