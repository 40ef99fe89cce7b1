"""What a maintainer relies on: versions agree, documents speak of what exists, nothing large or foreign is tracked."""

import ast
import re
from pathlib import Path

import pytest

import sret

ROOT = Path(__file__).parents[1]


def test_the_citation_has_the_package_s_version_and_the_paper():
    text = (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^version: (.*)$", text, re.MULTILINE)[1].strip('"') == sret.__version__
    assert "2111.05297" in text
    assert f"## [{sret.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_links_in_the_documents_lead_somewhere():
    documents = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
    assert documents
    for document in documents:
        for target in re.findall(r"\]\((?!https?://|#)([^)#\s]+)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_the_tree_in_the_design_is_the_package():
    """Every file stands there with the first line of its docstring, and a folder with that of its `__init__.py`."""
    tree = (ROOT / "docs" / "design.md").read_text().split("\nsrc/sret/\n")[1].split("\nrecipes/")[0]
    folders: list[str] = []
    drawn = {}
    for line in tree.splitlines():
        name, _, text = line.strip().partition(" ")
        del folders[(len(line) - len(line.lstrip())) // 2 - 1 :]
        if name.endswith("/"):
            folders.append(name.removesuffix("/"))
            name = "__init__.py"
        drawn["/".join([*folders, name])] = text.strip()
    package = ROOT / "src" / "sret"
    docstrings = {path: ast.get_docstring(ast.parse(path.read_text())) for path in package.rglob("*.py")}
    first_lines = {path: (text or "").partition("\n")[0].removesuffix(".") for path, text in docstrings.items()}
    assert drawn == {path.relative_to(package).as_posix(): line for path, line in first_lines.items()}


def test_every_public_thing_has_a_docstring():
    import importlib
    import inspect

    for path in (ROOT / "src" / "sret").rglob("*.py"):
        if path.name == "__main__.py":
            continue
        name = ".".join(path.relative_to(ROOT / "src").with_suffix("").parts).removesuffix(".__init__")
        if name.startswith("sret.kernels.gpu."):
            pytest.importorskip("triton")
        module = importlib.import_module(name)
        assert module.__doc__, name
        for attribute, value in vars(module).items():
            is_ours = getattr(value, "__module__", None) == name and not attribute.startswith("_")
            if is_ours and (inspect.isclass(value) or inspect.isfunction(value)):
                assert value.__doc__, f"{name}.{attribute}"


def test_the_package_is_typed():
    assert (ROOT / "src" / "sret" / "py.typed").exists()
