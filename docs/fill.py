"""Fills what the pages take from the code and the published study, between their marks.

``python docs/fill.py`` after an option, a field, a grid, a folder or docs/results has changed;
tests/docs/test_pages.py holds that the pages say what code and study say.
"""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import re
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
import typer.main
from scipy import stats

from analysis.chapters.literature import carried_over
from analysis.findings.decisions import one_sided
from analysis.findings.findings import Findings, compute
from analysis.load import read_study
from analysis.statistics import cells
from analysis.text.wording import (
    between,
    listing,
    megabytes,
    percent,
    points,
    span_of,
    without_shared_ends,
)
from search_spaces import grids, optuna_spaces
from tune_study import config, run
from tune_study.folder import schema

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
PAGES = (
    "README.md",
    "docs/options.md",
    "docs/architecture.md",
    "docs/results/README.md",
    "docs/results/adapters/README.md",
    "ray_results/README.md",
)
MORE = {
    "--grid": "your-own.md#a-grid-of-your-own",
    "--data-dir": "your-own.md#your-images",
    "--leave-out-broken": "your-own.md#your-images",
    "--cache-dir": "your-own.md#your-images",
    "--weights": "your-own.md#your-weights",
    "--device": "reliability.md#determinism",
    "--storage": "cluster.md#a-study-in-a-bucket",
    "--address": "cluster.md#on-a-cluster",
    "--batch": "memory.md#the-micro-batch",
    "--max-concurrent": "performance.md#several-trials-on-one-gpu",
    "--gpus-per-trial": "cluster.md#gpus",
    "--search": "search.md",
    "--scheduler": "search.md#pruning",
    "--space": "search.md#a-space-of-your-own",
    "--log": "tensorboard.md#mlflow-and-weights--biases",
}
"""The page that says more of an option."""
LIMITS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
"""JSON schema's words."""


def filled(text: str) -> str:
    """A page's text with every marked part as the code has it today."""
    parts = {
        "options": options,
        "grids": lambda: functions(grids),
        "spaces": lambda: functions(optuna_spaces),
        "fields": fields,
        "trials": lambda: columns(schema.TRIALS),
        "epochs": lambda: columns(schema.EPOCHS),
        "tune_study": lambda: package("tune_study"),
        "search_spaces": lambda: package("search_spaces"),
        "analysis": lambda: package("analysis"),
        "answer": answer,
        "results": results,
        "adapters": adapters,
    }
    marks = re.compile(r"(<!-- begin (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
    return marks.sub(lambda found: f"{found[1]}{parts[found[2]]()}\n{found[3]}", text)


def options() -> str:
    """The options of ``tune_study.run``: a table, or one per panel of its help."""
    panels: dict[str, list[list[str]]] = {}
    for option in typer.main.get_command(run.app).params:
        name = option.opts[0]
        if name == "--help":
            continue
        meaning = _cell(option.help)
        if option.default and not isinstance(option.default, bool):
            meaning += f"; default `{option.default}`"
        if name in MORE:
            meaning += f" ([{MORE[name].partition('#')[0]}]({MORE[name]}))"
        shown = f"{name} {option.metavar}" if option.metavar else name
        rows = panels.setdefault(option.rich_help_panel or "", [])
        rows.append([f"`{shown}`", meaning])
    heads = {panel: f"### {panel}\n\n" if panel else "" for panel in panels}
    return "\n\n".join(heads[panel] + _table("option | meaning", panels[panel]) for panel in panels)


def functions(module: ModuleType) -> str:
    """A module's public functions, each with the first line of what it says."""
    found = {
        name: function
        for name, function in vars(module).items()
        if inspect.isfunction(function) and function.__module__ == module.__name__
    }
    rows = [[f"`{name}`", _caption(f.__doc__)] for name, f in found.items() if name[0] != "_"]
    return _table("name | what it is", rows)


def fields() -> str:
    """The fields of ``config.TrialConfig``, a table per record."""
    known = config.TrialConfig.model_json_schema()
    tables, own = [], []
    for name, field in known["properties"].items():
        if "$ref" in field:
            record = known["$defs"][field["$ref"].rpartition("/")[2]]
            rows = [_field(record, f"{name}.", inner) for inner in record["properties"]]
            head = f"### {name}\n\n{_as_yaml(record['description'])}\n\n"
            tables.append(head + _table("field | values | default", rows))
        else:
            own.append(_field(known, "", name))
    return "\n\n".join([_table("field | values | default", own), *tables])


def _field(record: dict[str, Any], prefix: str, name: str) -> list[str]:
    field = record["properties"][name]
    default = _as_yaml(f"`{field.get('default', {})}`")  # an empty mapping is not in the schema
    if name in record.get("required", ()):
        default = "must be named"
    meaning = _docstrings().get((record["title"], name))
    values = _values(field) + (f". {_as_yaml(meaning)}" if meaning else "")
    return [f"`{prefix}{name}`", values, default]


def _values(field: dict[str, Any]) -> str:
    """What a field may hold, in words."""
    if "anyOf" in field:
        return " or ".join(_values(part) for part in field["anyOf"])
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    limits = [f"{sign} {field[key]}" for key, sign in LIMITS.items() if key in field]
    words = {"null": "`null`", "boolean": "`true` or `false`", "string": "text"}
    number = field.get("items", field.get("additionalProperties", {})).get("type") == "integer"
    words["array"] = "list of integers" if number else "list of patterns"
    words["object"] = f"pattern: {'integer' if number else 'mode'}"
    kind = words.get(field["type"], field["type"])
    return f"{kind} {', '.join(limits)}".strip()


@functools.cache
def _docstrings() -> dict[tuple[str, str], str]:
    """(class, field) -> the string that stands below the field in config.py."""
    found = {}
    for record in ast.parse(inspect.getsource(config)).body:
        for field, below in itertools.pairwise(getattr(record, "body", ())):
            if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
                found[record.name, field.target.id] = below.value.value
    return found


def columns(table: tuple[schema.Column, ...]) -> str:
    """The columns of one of a study's tables."""
    rows = [[f"`{c.name}`", c.kind, _cell(c.unit), _cell(c.meaning)] for c in table]
    return _table("column | type | unit | what it is", rows)


def package(name: str) -> str:
    """The files at a package's top and its folders, each with what its docstring begins with."""
    rows = []
    for path in sorted((ROOT / name).iterdir(), key=lambda path: (path.is_dir(), path.name)):
        source = path / "__init__.py" if path.is_dir() else path
        if source.suffix == ".py" and source.is_file() and path.name != "__init__.py":
            caption = _caption(ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))))
            link = f"../{name}/{path.name}"
            rows.append([f"[{path.name}{'/' * path.is_dir()}]({link})", caption])
    return _table("where | what", rows)


def answer() -> str:
    """The published study in three sentences."""
    found = _published()
    rows = found.comparison.to_dict("records")
    changes = [f"{points(row['mean_difference'])} (`{row['quantization']}`)" for row in rows]
    losses = [f"{100 * max(-one_sided(row)[0], 0):.2f}" for row in rows]
    held = found.memory.groupby("quantization", sort=False)["weights_bytes"].mean()
    sizes = [f"{megabytes(held[row['quantization']])} (`{row['quantization']}`)" for row in rows]
    peaks = found.peaks.groupby("quantization", sort=False)["ratio"]
    falls = [f"{span_of(ratios - 1, sign=True)} (`{mode}`)" for mode, ratios in peaks]
    return "\n".join(
        [
            f"- **Accuracy** changes against `none` in the mean by {listing(changes)}; with 95 % "
            f"confidence these lose at most {listing(losses)} pp "
            f"({rows[0]['n_configurations']} configurations, {rows[0]['n_pairs']} pairs each).",
            f"- **Memory**: base weights take {megabytes(held['none'])} in `none` (bf16) and "
            f"{listing(sizes)}; the peak of a training step changes by {listing(falls)}.",
            "- **QLoRA's finding** for language models, 4 bit is as good as 16 bit, by ratios of "
            f"scores, ours beside theirs: {'; '.join(carried_over(found.qlora))}.",
        ]
    )


def results() -> str:
    """The published study in one table: what each mode costs, on the whole and in each cell."""
    found = _published()
    trials = cells.finished(found.study.trials)
    cell = ["model", "dataset"]
    means = trials.groupby(["quantization", *cell])["test_accuracy"].mean()
    costs = found.differences.groupby(["quantization", *cell])["difference"].mean()
    probe = pd.read_csv(RESULTS / "probe.csv").set_index(cell)["test_accuracy"]
    held = found.memory.groupby("quantization")["weights_bytes"].mean()
    peaks = found.peaks.groupby("quantization")["ratio"]
    of_none = trials[trials["quantization"] == "none"]["peak_train_bytes"].mean()
    compared = found.comparison.to_dict("records")
    modes = [row["quantization"] for row in compared]
    names = [str(name) for name in trials["model"].unique()]
    shorter = dict(zip(names, without_shared_ends(names), strict=True))
    whole = (
        f"{points(row['mean_difference'])} ({between(row['ci_low'], row['ci_high'], scale=100)})"
        for row in compared
    )
    rows = [
        ["all (95 % interval)", "baseline", *whole, ""],
        ["verdict at 1 pp", "", *(row["verdict"] for row in compared), ""],
    ]
    for one in trials[cell].drop_duplicates().itertuples(index=False, name=None):
        cost = (points(costs[mode, *one], 1) for mode in modes)
        name = f"{shorter[one[0]]}, {one[1]}"
        rows.append([name, percent(means["none", *one]), *cost, percent(probe[one])])
    sizes = (megabytes(held[mode]) for mode in ("none", *modes))
    falls = (span_of(peaks.get_group(mode) - 1, sign=True) for mode in modes)
    rows += [["base weights", *sizes, ""], ["peak of a step", megabytes(of_none), *falls, ""]]
    head = " | ".join(f"`{mode}`" for mode in ("none", *modes))
    return _table(f"test accuracy, memory | {head} | linear probe", rows)


def adapters() -> str:
    """What nf4 has, costs and wins back with each adapter, over the seeds of one cell."""
    trials = cells.finished(read_study(RESULTS / "adapters").trials)
    called = {"default": "plain LoRA", "pissa": "PiSSA", "loftq": "LoftQ"}
    how = trials["lora.init_lora_weights"].map(called)
    trials = trials.assign(adapter=how.where(~trials["lora.use_dora"].astype(bool), "DoRA"))
    wide = trials.pivot(index="seed", columns=["adapter", "quantization"], values="test_accuracy")
    peaks = trials.groupby(["adapter", "quantization"])["peak_train_bytes"].mean()
    plain, *others = trials["adapter"].unique()
    rows = []
    for kind in (plain, *others):
        have = (percent(wide[kind][mode].mean()) for mode in ("none", "nf4"))
        cost = _over_seeds(wide[kind]["nf4"] - wide[kind]["none"])
        won = "–" if kind == plain else _over_seeds(wide[kind]["nf4"] - wide[plain]["nf4"])
        rows.append([kind, *have, cost, won, megabytes(peaks[kind, "nf4"])])
    head = "adapter | `none` | `nf4` | `nf4` costs | its `nf4` against plain LoRA's | `nf4`'s peak"
    return _table(head, rows)


def _over_seeds(differences: pd.Series) -> str:
    """The mean with its 95 % t-interval."""
    found = stats.ttest_1samp(differences, 0).confidence_interval()
    return f"{points(differences.mean())} ({between(*found, scale=100)})"


@functools.cache
def _published() -> Findings:
    return compute(read_study(RESULTS))


def _caption(text: str | None) -> str:
    return _cell((text or "").partition("\n\n")[0])


def _table(head: str, rows: Iterable[Iterable[str]]) -> str:
    lines = [f"| {head} |", "|---" * (head.count("|") + 1) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _as_yaml(text: str) -> str:
    """A cell in which a value is written as ``--set`` wants it."""
    words = {"`None`": "`null`", "`True`": "`true`", "`False`": "`false`"}
    return re.sub("|".join(words), lambda found: words[found[0]], _cell(text))


def _cell(text: str) -> str:
    """Text for a cell of a Markdown table, on one line."""
    return " ".join(text.replace("``", "`").split()).replace("|", "\\|")


if __name__ == "__main__":
    for page in PAGES:
        path = ROOT / page
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
