"""What people see of a comparison: a table, and a figure of the same numbers."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from sret.bench.runner import Report, Row
from sret.errors import InputError
from sret.files import write_atomically

FIGURES = (".png", ".svg", ".pdf")
WIDEST = 200  # columns: a narrow terminal wraps a line, and loses nothing
OURS = ("#0b5fa5", "#3f8fcf", "#86bce6")
OTHERS = ("#8b9198", "#b3b8bd", "#6a7077")
INK, FAINT = "#24292f", "#6e7781"


def as_text(report: Report) -> str:
    """The header, the table, what its columns mean, and what was left out."""
    console = Console(width=WIDEST, color_system=None, highlight=False)
    with console.capture() as capture:
        console.print(_table(report))
    table = "\n".join(line.rstrip() for line in capture.get().splitlines())
    return "\n".join([*_header(report), "", table, "", *_legend(report), *(f"left out: {x}" for x in report.left_out)])


def _header(report: Report) -> list[str]:
    about = report.about
    packages = [f"{name} {about[name]}" for name in ("torch", "timm", "onnxruntime", "openvino") if name in about]
    commit = f" ({about['commit'][:7]})" if about["commit"] else ""
    peaks = ", ".join(f"{gflops:,.0f} in {dtype}" for dtype, gflops in about["roofline_gflops"].items())
    return [
        f"sret {about['sret']}{commit}, {', '.join(packages)}, python {about['python']}",
        f"{_machine(about)}; fastest matrix product, GFLOP/s: {peaks}",
        f"{_conditions(report)}; {about['rounds']} alternating rounds",
    ]


def _machine(about: dict[str, Any]) -> str:
    threads = about["threads"]
    return f"{about['device']}, {threads} thread{'s' if threads > 1 else ''} of {about['cores']} cores"


def _conditions(report: Report) -> str:
    sizes = {row.pixels for row in report.rows}
    pixels = f", {_size(sizes.pop())} pixels" if len(sizes) == 1 else ""
    mode = "steps of training (forward, backward, AdamW)" if _is_training(report) else "inference"
    return f"{mode}, batch {report.about['batch_size']}{pixels}"


def _is_training(report: Report) -> bool:
    return report.about["mode"] == "training"


def _size(pixels: tuple[int, int]) -> str:
    return f"{pixels[0]}x{pixels[1]}"


def _groups(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """Rows by engine and dtype."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(f"{row.engine}, {row.dtype}", []).append(row)
    return list(groups.items())


def _table(report: Report) -> Table:
    groups = _groups(report.rows)
    has_sizes, has_memory = len({row.pixels for row in report.rows}) > 1, report.rows[0].peak_mib is not None
    columns = {
        "\nmodel": lambda row: "  " + row.model,
        "\npixels": (lambda row: _size(row.pixels)) if has_sizes else None,
        "ms per\nimage": lambda row: _three(row.ms_per_image),
        "\nIQR": lambda row: f"{row.iqr_percent:.1f} %",
        "images\nper s": lambda row: _three(row.images_per_s),
        "vs first\nrow": lambda row: f"{row.vs_first:.2f}",
        "vs first\nmodel": (lambda row: "-" if row.vs_first_model is None else f"{row.vs_first_model:.2f}")
        if len(groups) > 1
        else None,
        "\nMACs": lambda row: _macs(row.macs),
        "% of\nroof": lambda row: "-" if row.percent_of_roofline is None else f"{row.percent_of_roofline:.1f}",
        "peak\nMiB": (lambda row: _three(row.peak_mib)) if has_memory else None,
        "\ndiff": lambda row: "-" if row.difference is None else f"{row.difference:.0e}" if row.difference else "0",
    }
    shown = {name: cell for name, cell in columns.items() if cell is not None}
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for name in shown:
        table.add_column(name, justify="left" if name == "\nmodel" else "right", no_wrap=True)
    for title, rows in groups:
        table.add_row(title)
        for row in rows:
            table.add_row(*(cell(row) for cell in shown.values()), end_section=row is rows[-1])
    return table


def _macs(number: int) -> str:
    return f"{number / 1e9:.2f} G" if number >= 1e8 else f"{number / 1e6:.1f} M"


def _three(number: float) -> str:
    """Three digits, no exponent."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}" if number < 1 else f"{number:#.3g}"


def _legend(report: Report) -> list[str]:
    what = "the loss" if _is_training(report) else "the answer"
    steps = "; a step of training as three forwards" if _is_training(report) else ""
    lines = [
        "vs: time over time, median over the rounds. First model: under the same engine and dtype.",
        f"MACs: multiply-adds of one image's forward. Roof: the fastest matrix product, 2 FLOPs each{steps}.",
        f"Diff: largest difference of {what} from eager float32, over its largest number; checked before timing.",
    ]
    if report.rows[0].peak_mib is not None:
        kept = "weights and the optimizer's state" if _is_training(report) else "weights"
        lines.insert(2, f"Peak: memory taken for a while, beyond {kept}.")
    return lines


# figure --------------------------------------------------------------------------------------------------------------


def check_figure(path: Path) -> None:
    """Raises `InputError` before anything is measured for a file that could not be written after."""
    if path.suffix not in FIGURES:
        raise InputError(f"{path}: a figure's name ends in {', '.join(FIGURES)}")
    if path.exists():
        raise InputError(f"{path} exists already; name another --figure")
    parent = path.absolute().parent
    if not parent.is_dir():
        raise InputError(f"{parent}: no such folder for the figure")


def draw(report: Report, path: Path, title: str = "") -> None:
    """Bars of ms per image by engine and dtype, whiskers over the middle half of the rounds; ours in colour."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    groups = _groups(report.rows)
    colors = _colors(report.rows)
    lines = len(report.rows) + 0.9 * len(groups)
    figure, axes = plt.subplots(figsize=(9, 1.5 + 0.34 * lines), layout="constrained")
    place, places, longest = 0.0, [], 0.0
    for name, rows in groups:
        axes.text(0, place, f" {name}", va="center", ha="left", fontsize=10, weight="bold", color=INK)
        place += 0.95
        for row in rows:
            low, high = _quartiles(row, report.about["batch_size"])
            axes.barh(place, row.ms_per_image, height=0.78, color=colors[row.model])
            axes.plot([low, high], [place, place], color=INK, linewidth=1.4, solid_capstyle="butt")
            end = max(high, row.ms_per_image)
            beside: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": 9}
            axes.annotate(f"{_three(row.ms_per_image)} ms", (end, place), (6, 0), color=INK, **beside)
            if row.vs_first_model is not None and len(rows) > 1:
                axes.annotate(f"{row.vs_first_model:.2f}\u00d7", (end, place), (58, 0), color=FAINT, **beside)
            longest = max(longest, end)
            places.append((place, row.model))
            place += 1
        place += 0.35
    axes.set_yticks([y for y, _ in places], [name for _, name in places], fontsize=9, color=INK)
    axes.set(ylim=(place - 0.6, -0.8), xlim=(0, 1.22 * longest))
    axes.set_xlabel(f"ms per image, median and middle half of {report.about['rounds']} rounds", color=FAINT, fontsize=9)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", colors=FAINT, labelsize=8)
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#d0d7de")
    title = title or f"Time per image, and \u00d7 that of {report.rows[0].model}"
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, color=INK)
    axes.set_title(f"{_conditions(report)}; {_machine(report.about)}", loc="left", fontsize=8.5, color=FAINT)
    buffer = BytesIO()
    figure.savefig(buffer, format=path.suffix[1:], dpi=160)
    plt.close(figure)
    write_atomically(path, buffer.getvalue())


def _quartiles(row: Row, batch_size: int) -> tuple[float, float]:
    """ms per image that a quarter of the rounds stay below, and a quarter exceed."""
    ordered = sorted(row.seconds)
    low, high = ordered[len(ordered) // 4], ordered[-1 - len(ordered) // 4]
    return 1e3 * low / batch_size, 1e3 * high / batch_size


def _colors(rows: Sequence[Row]) -> dict[str, str]:
    colors: dict[str, str] = {}
    for is_ours, palette in ((True, OURS), (False, OTHERS)):
        models = dict.fromkeys(row.model for row in rows if row.is_ours == is_ours)
        colors.update({model: palette[i % len(palette)] for i, model in enumerate(models)})
    return colors
