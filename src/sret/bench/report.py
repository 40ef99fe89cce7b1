"""Reports a benchmark, one row per candidate: as a table for people, and as a line of JSON for programs."""

import json
import textwrap
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from sret.bench.timing import quartiles, ratio

COLUMNS = {  # of the table: header and format
    "pixels": ("\npixels", "s"),
    "ms_per_image": ("ms per\nimage", ",.3f"),
    "iqr_percent": ("IQR\n%", ".1f"),
    "vs_first": ("vs first\nrow", ".2f"),
    "vs_first_model": ("vs first\nmodel", ".2f"),
    "gmacs": ("\nGMACs", ".3f"),
    "percent_of_peak": ("% of\npeak", ".1f"),
    "difference": ("\ndiff", ".1g"),
}
LEGEND = """\
ms per image: median of the rounds, in which all rows alternate. IQR: interquartile range / median.
vs first row: median over the rounds of time / time of the first row. vs first model: within an engine and data type.
GMACs: 1e9 multiply-adds of a forward pass (training counts as 3). % of peak: of the fastest matrix product's GFLOP/s.
diff: largest difference of the output (in training of the loss) from eager float32 / largest value."""


@dataclass(frozen=True)
class Row:
    """Measurements of one candidate: a model with an engine and a data type."""

    model: str
    engine: str
    dtype: str
    pixels: str  # height x width
    gmacs: float  # 1e9 multiply-adds of a forward pass for one image
    difference: float | None  # of the output from eager float32 / largest value; None for an exported file
    seconds: tuple[float, ...] = ()  # per batch, in each round


@dataclass(frozen=True)
class Report:
    """Rows, the conditions of the measurement, and the candidates that were left out, with the reason."""

    about: dict[str, Any]
    rows: tuple[Row, ...]
    left_out: tuple[str, ...]

    def values(self) -> list[dict[str, Any]]:
        """The rows with what follows from their times; None where a value does not exist."""
        rows, batch_size = [], self.about["batch_size"]
        for row in self.rows:
            (low, seconds, high), peak = quartiles(row.seconds), self.about["peak_gflops"].get(row.dtype)
            same = next(r for r in self.rows if (r.engine, r.dtype) == (row.engine, row.dtype))
            gflops = 2 * row.gmacs * batch_size * (3 if self.about["mode"] == "training" else 1) / seconds
            computed = {
                "ms_per_image": 1e3 * seconds / batch_size,
                "ms_quartiles": (1e3 * low / batch_size, 1e3 * high / batch_size),
                "iqr_percent": 100 * (high - low) / seconds,
                "vs_first": ratio(row.seconds, self.rows[0].seconds),
                "vs_first_model": ratio(row.seconds, same.seconds) if same.model == self.rows[0].model else None,
                "percent_of_peak": 100 * gflops / peak if peak else None,
            }
            rows.append({name: value for name, value in asdict(row).items() if name != "seconds"} | computed)
        return rows

    def to_json(self) -> str:
        """One line, without the times of single rounds."""
        data = json.dumps({"benchmark": "bench", **self.about, "rows": self.values(), "left_out": self.left_out})
        return json.dumps(json.loads(data, parse_float=lambda digits: float(f"{float(digits):.6g}")))

    def to_text(self) -> str:
        """The conditions, the table, the meaning of its columns, and what was left out."""
        about = self.about | {"peak_gflops": " and ".join(f"{v} in {k}" for k, v in self.about["peak_gflops"].items())}
        paths = [f"{name}: {path}" for name, path in about.pop("gpu_paths", {}).items()]
        conditions = textwrap.fill(", ".join(f"{name} {value}" for name, value in about.items()), 100)
        console = Console(width=200, color_system=None, highlight=False, markup=False)
        with console.capture() as table:
            console.print(self._table())
        lines = "\n".join(line.rstrip() for line in table.get().splitlines())
        notes = [*paths, *(f"left out: {reason}" for reason in self.left_out)]
        return "\n".join([conditions, "", lines, "", LEGEND, *notes])

    def _table(self) -> Table:
        rows = self.values()
        has_groups = any(row["vs_first_model"] != row["vs_first"] for row in rows)
        columns = {name: column for name, column in COLUMNS.items() if has_groups or name != "vs_first_model"}
        table = Table("\nmodel", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
        for header, _ in columns.values():
            table.add_column(header, justify="right", no_wrap=True)
        for title, group in groupby(rows, lambda row: f"{row['engine']}, {row['dtype']}"):
            table.add_row(title)
            for row in group:
                cells = ("-" if row[name] is None else format(row[name], form) for name, (_, form) in columns.items())
                table.add_row("  " + row["model"], *cells)
            table.add_section()
        return table
