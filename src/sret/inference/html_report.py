"""Writes an evaluation as one self-contained HTML file: classes, confusions, calibration, the worst mistakes."""

import base64
import io
import re
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from PIL import Image

from sret.data.dataset import Samples
from sret.data.preprocess import Preprocessing, name_of
from sret.errors import printable
from sret.files import write_atomically
from sret.inference.statistics import Statistics, wilson

MISTAKES = 48
THUMBNAIL = 112  # pixels
MAX_CELLS = 30  # up to this number of classes, confusions are a matrix; otherwise a list of the most frequent ones
MAX_CONFUSIONS = 20

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 64rem; padding: 0 1rem; color: #1f2328 }
table { border-collapse: collapse; margin: .5rem 0 } th, td { padding: .2rem .6rem; text-align: right }
th { font-weight: 600; border-bottom: 1px solid #d1d9e0 } .name { text-align: left }
.matrix td:not(.name) { min-width: 1.2rem; text-align: center } .scroll { overflow-x: auto }
.matrix th { text-align: center; padding: .3rem .2rem }
.upright th { writing-mode: sideways-lr; text-align: left; white-space: nowrap }
.mistakes { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); gap: 1rem }
figure { margin: 0; font-size: 12px } h1, figure { overflow-wrap: break-word }
.wrong { color: #cf222e } .right { color: #1a7f37 }
img { image-rendering: auto; border-radius: 3px } .bar { background: #0969da; height: .7rem; display: inline-block }
@media (max-width: 40rem) { body { margin: 1rem auto } th, td { padding: .2rem .25rem; font-size: 13px } }
"""


def write_html(
    path: Path, title: str, names: Sequence[str], found: Statistics, samples: Samples, preprocessing: Preprocessing
) -> None:
    """Writes the page.

    Args:
        names: names of the classes.
        found: statistics of the predictions.
        samples: the evaluated images; those of the worst mistakes are read again.
    """
    body = "\n".join(_body(title, names, found, samples, preprocessing))
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style><body>{body}</body></html>\n"
    )
    write_atomically(path, page.encode())


def _body(
    title: str, names: Sequence[str], found: Statistics, samples: Samples, preprocessing: Preprocessing
) -> Iterator[str]:
    right, count = int(found.is_right.sum()), len(found.truth)
    yield f"<h1>{_name(title)}</h1><p><b>top-1 accuracy {_percent(right, count)} on {count:,} images</b> "
    yield f"(95 % interval {_interval(right, count)})</p>"
    yield "<h2>Classes</h2><div class=scroll>" + _classes(names, found) + "</div>"
    yield "<h2>Confusions</h2><div class=scroll>"
    yield (_matrix(names, found) if len(names) <= MAX_CELLS else _most_frequent(names, found)) + "</div>"
    yield "<h2>Calibration</h2><p>Accuracy of the predictions by their confidence. The mean difference between both "
    yield f"(expected calibration error) is {100 * found.calibration_error():.1f} %.</p>"
    yield "<div class=scroll>" + _calibration(found) + "</div>"
    then = "" if count - right >= MISTAKES else ", then the least confident correct predictions"
    yield f"<h2>Mistakes</h2><p>The most confident mistakes first{then}.</p><div class=mistakes>"
    for row in found.worst(MISTAKES):
        yield _mistake(names, found, int(row), samples, preprocessing)
    yield "</div>"


def _classes(names: Sequence[str], found: Statistics) -> str:
    totals, predicted = found.confusion.sum(axis=1), found.confusion.sum(axis=0)
    accuracy = {k: found.confusion[k, k] / totals[k] for k in range(len(names)) if totals[k]}
    rows = [
        f"<tr><td class=name>{_name(names[k])}<td>{totals[k]:,}<td>{_percent(found.confusion[k, k], totals[k])}"
        f"<td>{_interval(found.confusion[k, k], totals[k])}<td>{_percent(found.confusion[k, k], predicted[k])}"
        for k in sorted(accuracy, key=accuracy.__getitem__)
    ]
    head = "<tr><th class=name>class<th>images<th>accuracy<th>95 % interval<th>precision"
    return f"<table>{head}{''.join(rows)}</table>"


def _matrix(names: Sequence[str], found: Statistics) -> str:
    share = found.confusion / found.confusion.sum(axis=1, keepdims=True).clip(1)
    rows = []
    for i, name in enumerate(names):
        cells = "".join(_cell(int(n), float(part)) for n, part in zip(found.confusion[i], share[i], strict=True))
        rows.append(f"<tr><td class=name>{_name(name)}{cells}")
    head = "".join(f"<th>{_name(name)}" for name in names)
    kind = "matrix upright" if max(map(len, names)) > 3 else "matrix"  # long names stand above their columns
    about = "Rows: true classes. Columns: predictions."
    return f'<p>{about}</p><table class="{kind}"><tr><th>{head}{"".join(rows)}</table>'


def _cell(count: int, share: float) -> str:
    color = ";color:#fff" if share > 0.5 else ""
    return f'<td style="background:rgb(9 105 218/{share:.2f}){color}">{count or ""}'


def _most_frequent(names: Sequence[str], found: Statistics) -> str:
    rows = [
        f"<tr><td class=name>{_name(names[i])}<td class=name>{_name(names[j])}<td>{n:,}"
        for i, j, n in found.confusions(MAX_CONFUSIONS)
    ]
    return f"<table><tr><th class=name>true class<th class=name>prediction<th>images{''.join(rows)}</table>"


def _calibration(found: Statistics) -> str:
    rows = [
        f"<tr><td>{100 * confidence:.1f} %<td>{100 * right:.1f} %<td>{n:,}<td class=name>"
        f'<span class=bar style="width:{120 * right:.0f}px"></span>'
        for confidence, right, n in found.calibration()
    ]
    return f"<table><tr><th>mean confidence<th>accuracy<th>images<th>{''.join(rows)}</table>"


def _mistake(names: Sequence[str], found: Statistics, row: int, samples: Samples, preprocessing: Preprocessing) -> str:
    source = samples.images[int(found.order[row])]
    image = preprocessing.load(source)
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=85)
    truth, predicted = names[int(found.truth[row])], names[int(found.predicted[row])]
    kind, actual = ("right", "") if found.is_right[row] else ("wrong", f"<br>true: {_name(truth)}")
    name = "" if isinstance(source, Image.Image) else f"<br>{_name(printable(name_of(source)))}"
    return (
        f'<figure><img width={THUMBNAIL} alt="" src="data:image/jpeg;base64,'
        f'{base64.b64encode(buffer.getvalue()).decode()}"><figcaption><b class={kind}>{_name(predicted)} '
        f"{100 * found.confidence[row]:.0f} %</b>{actual}{name}</figcaption></figure>"
    )


def _name(text: str) -> str:
    """Text as HTML that may break after the separators of a name or a path, and inside a word only if it must."""
    return re.sub(r"([_/-]+)", r"\1<wbr>", escape(text))


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def _interval(right: int, count: int) -> str:
    low, high = wilson(int(right), int(count))
    return f"{100 * low:.1f} to {100 * high:.1f} %"
