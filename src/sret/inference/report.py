"""Writes the report of an evaluation: an HTML page with file names and tables, or a PNG page."""

from pathlib import Path

from sret.data.preprocess import Preprocessing
from sret.errors import InputError
from sret.inference.evaluate import Evaluation
from sret.inference.html_report import write_html
from sret.inference.statistics import Statistics

SUFFIXES = (".html", ".png")


def check_report_path(path: Path) -> None:
    """Raises `InputError` for a wrong file name, before the evaluation."""
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"{path}: the name of a report ends in {' or '.join(SUFFIXES)}")
    if path.is_dir():
        raise InputError(f"{path} is a folder; give a file name")


def write_report(path: Path, evaluation: Evaluation, preprocessing: Preprocessing) -> None:
    """Writes the report. Raises `InputError` for a suffix other than .html and .png."""
    check_report_path(path)
    names = evaluation.data.class_names
    found = Statistics.of(evaluation.predictions, len(names))
    title = f"{evaluation.data.name}, {evaluation.split}"
    if path.suffix.lower() == ".html":
        write_html(path, title, names, found, evaluation.samples, preprocessing)
    else:
        from sret.inference.png_report import write_png  # matplotlib takes a second

        write_png(path, title, names, found, evaluation.samples, preprocessing)
