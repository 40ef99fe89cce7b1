"""Writes an evaluation as one page: HTML with file names and tables, or PNG."""

from pathlib import Path

from sret.data.preprocess import Preprocessing
from sret.errors import InputError
from sret.inference.evaluate import Evaluation
from sret.inference.html_report import write_html
from sret.inference.statistics import Statistics

SUFFIXES = (".html", ".png")


def check_report_path(path: Path) -> None:
    """Raises `InputError` for a name that `write_report` cannot write, before there is a result to lose."""
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"{path}: a report's name ends in {' or '.join(SUFFIXES)}")
    if path.is_dir():
        raise InputError(f"{path} is a folder; name a file in it")


def write_report(path: Path, evaluation: Evaluation, preprocessing: Preprocessing) -> None:
    """Writes the page. Raises `InputError` for another suffix than .html and .png."""
    check_report_path(path)
    names = evaluation.data.class_names
    found = Statistics.of(evaluation.predictions, len(names))
    title = f"{evaluation.data.name}, {evaluation.split}"
    if path.suffix.lower() == ".html":
        write_html(path, title, names, found, evaluation.samples, preprocessing)
    else:
        from sret.inference.png_report import write_png  # matplotlib takes a second

        write_png(path, title, names, found, evaluation.samples, preprocessing)
