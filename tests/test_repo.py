"""What a maintainer relies on: versions agree, documents speak of what exists, nothing large or foreign is tracked."""

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


def test_the_design_names_every_module():
    design = (ROOT / "docs" / "design.md").read_text()
    for path in (ROOT / "src" / "sret").rglob("*.py"):
        if path.name != "__init__.py":
            assert path.name in design, path.name


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
