"""The report's files: complete, self-contained, honest about what it can't say, and harmless."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from analysis import report
from analysis.figures import style
from analysis.findings import summary
from analysis.load import StudyError, read_study
from tests import synthetic
from tests.analysis.pages import Document, without_rendering, written

ROOT = Path(__file__).resolve().parents[2]
TINY = ("deit_tiny_patch16_224",)
EVIL = '<script>alert(1)</script>$x_1$ & "q" | `c` \u202e{{7*7}} \\input{x} <img src=x onerror=a()>'


@pytest.fixture(scope="module", autouse=True)
def _small_figures() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(style, "PRINT_DPI", 30)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Document]:
    path = synthetic.write_study(
        tmp_path_factory.mktemp("studies") / "finished", effects={"nf4": -0.01}, rng_seed=7
    )
    return path, written(path)[1]


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Document]:
    folder = tmp_path_factory.mktemp("studies") / "sim"
    cells = synthetic.plan(models=TINY, datasets=("cifar10",))
    path = synthetic.write_study(folder, cells, simulated=True, effects={"nf4": -0.01})
    with pytest.MonkeyPatch.context() as patch:
        without_rendering(patch)
        return path, written(path)[1]


@pytest.fixture(scope="module")
def evil(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Document]:
    cells = synthetic.plan(models=(EVIL, "m" * 300), datasets=(EVIL,), lora=((4, 8), (8, 16)))
    folder = tmp_path_factory.mktemp("studies") / "evil"
    path = synthetic.write_study(folder, cells, failures={0: "error", 1: "oom"})
    manifest = json.loads((path / "study.json").read_text())
    manifest |= {"study": EVIL, "command": EVIL}
    manifest["provenance"]["versions"][EVIL] = EVIL
    (path / "study.json").write_text(json.dumps(manifest))
    (path / EVIL.replace("/", "_")[:60]).mkdir()
    failed = path / str(cells[0]["trial_id"]) / "results.json"
    failed.write_text(json.dumps({**json.loads(failed.read_text()), "error": f"failed: {EVIL}"}))
    with pytest.MonkeyPatch.context() as patch:
        without_rendering(patch, but_inline=True)
        return path, written(path)[1]


def test_everything_is_written(finished: tuple[Path, Document]) -> None:
    path = finished[0]
    for name in ("report/report.html", "report/report.md", summary.SUMMARY_FILE,
                 summary.DETAILS_FILE, "report/tables/accuracy.tex"):  # fmt: skip
        assert (path / name).stat().st_size > 500
    for kind in ("png", "pdf"):
        assert len(list((path / "report/figures").glob(f"*.{kind}"))) == 12
    assert not list(path.rglob("*.tmp"))


def test_the_page_needs_nothing_else(finished: tuple[Path, Document]) -> None:
    document = finished[1]
    assert not document.named("link")
    assert not document.named("iframe")
    assert not any("src" in attributes for attributes in document.named("script"))
    sources = [image["src"] or "" for image in document.named("img")]
    assert len(sources) == 7
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert all(image["alt"] for image in document.named("img"))
    drawings = document.named("svg")
    assert len(drawings) == 5
    assert all(one["role"] == "img" and one["aria-label"] for one in drawings)
    page = (finished[0] / "report/report.html").read_text()
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page)
    assert not re.search(r"url\((?!#)", page)
    assert "viewport" in page
    assert "prefers-color-scheme: dark" in page


def test_only_our_script_may_run(finished: tuple[Path, Document]) -> None:
    document = finished[1]
    assert len(document.named("script")) == 1
    digest = hashlib.sha256("".join(document.code["script"]).encode()).digest()
    (policy,) = (one["content"] or "" for one in document.named("meta") if "http-equiv" in one)
    assert policy == (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{base64.b64encode(digest).decode()}'"
    )


def test_a_full_grid_is_light(finished: tuple[Path, Document]) -> None:
    assert len(finished[1].named("svg")) == 5
    assert (finished[0] / "report/report.html").stat().st_size < 2_000_000


def test_the_table_of_contents_leads_somewhere(finished: tuple[Path, Document]) -> None:
    document = finished[1]
    ids = [attributes["id"] for _, attributes in document.tags if attributes.get("id")]
    assert len(ids) == len(set(ids))
    targets = [(link["href"] or "")[1:] for link in document.named("a")]
    assert len([name for name in targets if not name.startswith("figure-")]) == 9
    assert set(targets) <= set(ids)
    drawn = [(link["href"] or "")[1:] for link in document.named("use")]
    assert len(drawn) > 144
    assert set(drawn) <= set(ids)


def test_the_picture_stands_beside_the_answer(finished: tuple[Path, Document]) -> None:
    path, document = finished
    ids = [attributes["id"] for _, attributes in document.tags if attributes.get("id")]
    first = ["answer", "figure-accuracy_difference", "figure-pareto_weights"]
    places = [ids.index(name) for name in (*first, "caption-glance", "accuracy")]
    assert places == sorted(places)
    assert "Use nf4-dq (4 bits per weight, constants compressed) if you accept" in document.text
    markdown = (path / "report/report.md").read_text()
    pictures = [markdown.index(f"figures/{name.partition('-')[2]}.png") for name in first[1:]]
    assert pictures == sorted(pictures)
    assert markdown.index("## What to use") < pictures[0] < markdown.index("## Accuracy")
    assert markdown.count("figures/accuracy_difference.png") == 1


def test_every_trial_has_a_row_to_sort_and_filter_by(finished: tuple[Path, Document]) -> None:
    path, document = finished
    (table,) = (one for one in document.named("table") if one.get("class") == "sortable")
    assert table["aria-labelledby"] == "caption-every_trial"
    page = (path / "report/report.html").read_text()
    own = Document(
        page[page.index('<table aria-labelledby="caption-every_trial"') :].split("</table>")[0]
    )
    assert len(own.named("tr")) == 145
    heads = own.named("th")[:11]
    assert [head.get("scope") for head in heads] == ["col"] * 11
    assert sum("data-pick" in head for head in heads) == 2
    for row in read_study(path).trials.to_dict("records"):
        assert row["trial_id"] in own.words
    assert not (path / "report/tables/every_trial.tex").exists()
    assert "**Every trial**" in (path / "report/report.md").read_text()


def test_it_begins_with_the_answer(finished: tuple[Path, Document]) -> None:
    text = finished[1].text
    start = text.index("What to use")
    assert "What quantization costs: finished" in text[:start]
    assert start < text.index("Use nf4-dq") < text.index("Contents")
    assert "12 configurations, 36 pairs" in text[: text.index("Contents")]
    assert "unfinished" not in text[:start].lower()
    assert "simulated" not in text.lower()


def test_the_planted_loss_is_recovered(finished: tuple[Path, Document]) -> None:
    found = json.loads((finished[0] / summary.SUMMARY_FILE).read_text())
    rows = {row["quantization"]: row for row in found["accuracy"]}
    assert rows["nf4"]["ci_low"] <= -0.01 <= rows["nf4"]["ci_high"]
    assert rows["nf4-dq"]["verdict"] in ("equivalent", "undecided", "not inferior")
    assert rows["nf4"]["verdict"] not in ("equivalent", "not inferior")
    assert "no effect" not in finished[1].text.replace("'no effect'", "")


def test_simulated_studies_say_so_everywhere(simulated: tuple[Path, Document]) -> None:
    path, document = simulated
    page = (path / "report/report.html").read_text()
    assert "<title>What quantization costs: sim (simulated)</title>" in page
    assert "SIMULATED." in document.text[: document.text.index("What to use")]
    assert document.text.count("(simulated)") > 10
    assert "Dettmers" not in document.text
    assert "comparable with reservations" not in document.text
    assert "Simulated. " in (path / "report/tables/accuracy.tex").read_text()
    assert "(simulated)" in (path / "report/report.md").read_text()
    found = json.loads((path / summary.SUMMARY_FILE).read_text())
    assert found["simulated"] is True
    assert "simulated" in found["literature_comparison"]["unavailable"]
    assert not (path / "report/figures/qlora_ratios.png").exists()
    assert not (path / "report/tables/qlora.tex").exists()


def test_json_blocks_are_filled_or_explained(finished: tuple[Path, Document]) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} in JSON")

    for name in (summary.SUMMARY_FILE, summary.DETAILS_FILE):
        found = json.loads((finished[0] / name).read_text(), parse_constant=refuse)
        for key, value in found.items():
            assert value not in ([], {}, None) or key == "problems", key
    found = json.loads((finished[0] / summary.SUMMARY_FILE).read_text())
    assert found["progress"] == {
        "planned": 144, "finished": 144, "good": 144, "success_rate": 1.0, "complete": True,
        "by_status": found["progress"]["by_status"],
    }  # fmt: skip
    assert len(found["by_mode"]) == 4
    assert len(found["recommendations"]) >= 5
    assert {row["verdict"] for row in found["literature_comparison"]["qlora"]} <= {
        "comparable", "comparable with reservations", "not comparable",
    }  # fmt: skip


def test_the_empty_cell_of_qlora_stays_empty(finished: tuple[Path, Document]) -> None:
    found = json.loads((finished[0] / summary.SUMMARY_FILE).read_text())
    rows = found["literature_comparison"]["qlora"]
    nf4 = [row for row in rows if row["quantization"] == "nf4"]
    assert [(row["their_mean"], row["n_reference"]) for row in nf4] == [(None, 0)]
    text = finished[1].text
    assert "prints no figure for NF4 without double quantization" in text
    assert "85.8" not in text  # recalled only, so never printed


def test_names_from_data_are_text(evil: tuple[Path, Document]) -> None:
    path, document = evil
    assert len(document.named("script")) == 1
    assert len(document.named("svg")) == 5
    assert all((image["src"] or "").startswith("data:") for image in document.named("img"))
    assert not any(name.startswith("on") for _, own in document.tags for name in own)
    assert "<script>alert(1)</script>" in document.text
    assert "failed: <script>alert(1)</script>" in document.text
    assert "{{7*7}}" in document.text
    assert "\u202e" not in document.text
    markdown = (path / "report/report.md").read_text()
    assert "<script" not in markdown
    assert "<img" not in markdown
    assert "\u202e" not in markdown
    assert "not read" in document.text  # the foreign folder is named among the problems


def _has_latex() -> bool:
    tools = [shutil.which("pdflatex"), shutil.which("kpsewhich")]
    if not all(tools):
        return False
    found = subprocess.run(
        ["kpsewhich", "booktabs.sty"], capture_output=True, check=False, timeout=60
    )
    return bool(found.stdout.strip())


@pytest.mark.skipif(not _has_latex(), reason="pdflatex or booktabs is not installed")
@pytest.mark.parametrize("name", ["finished", "evil"])
def test_latex_tables_compile(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    path = request.getfixturevalue(name)[0]
    tables = sorted((path / "report/tables").glob("*.tex"))
    assert len(tables) > 15
    body = "\n".join(f"\\input{{{table}}}\\clearpage" for table in tables)
    source = "\\documentclass{article}\\usepackage{booktabs,graphicx}\\begin{document}\n"
    (tmp_path / "all.tex").write_text(f"{source}{body}\n\\end{{document}}\n")
    ran = subprocess.run(
        ["pdflatex", "-no-shell-escape", "-halt-on-error", "-interaction=nonstopmode", "all.tex"],
        cwd=tmp_path, capture_output=True, text=True, errors="replace", check=False, timeout=120,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-2000:]
    too_wide = [float(width) for width in re.findall(r"Overfull .hbox \(([\d.]+)pt", ran.stdout)]
    # A name of 300 letters has no place to be broken.
    assert name == "evil" or max(too_wide, default=0) < 30
    assert (tmp_path / "all.pdf").stat().st_size > 10_000


@pytest.mark.usefixtures("plain_figures")
def test_a_second_report_is_the_same_and_leaves_nothing_stale(tmp_path: Path) -> None:
    cells = synthetic.plan(models=TINY, datasets=("cifar10",), lora=((4, 8),), seeds=(1, 2))
    path = synthetic.write_study(tmp_path / "s", cells)
    first = report.write_report(path).read_bytes()
    stale = path / "report/tables/old.tex"
    stale.write_text("x")
    assert report.write_report(path).read_bytes() == first
    assert not stale.exists()
    assert (path / "report/figures/gradient_layers.png").exists()
    for file in path.glob("*/gradients.json"):
        file.unlink()
    report.write_report(path)
    assert not (path / "report/figures/gradient_layers.png").exists()


def test_the_report_adds_no_problem_to_the_study(finished: tuple[Path, Document]) -> None:
    assert read_study(finished[0]).problems == []


def test_mistakes_are_one_sentence_and_exit_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(StudyError):
        report.write_report(tmp_path / "nowhere")
    assert report.main([str(tmp_path / "nowhere")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "nowhere" in captured.err
    (tmp_path / "s").mkdir()
    assert report.main([str(tmp_path / "s")]) == 2
    assert report.main([str(tmp_path / "no\n\x1b[31mwhere")]) == 2
    told = capsys.readouterr().err
    assert told.splitlines()[-1].endswith("no  [31mwhere does not exist: name the folder that "
                                          "holds study.json")  # fmt: skip


@pytest.mark.usefixtures("plain_figures")
def test_a_folder_that_cannot_be_written_to_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = synthetic.plan(models=TINY, datasets=("cifar10",), lora=((4, 8),), seeds=(1,))
    path = synthetic.write_study(tmp_path / "s", cells)
    (path / "report").write_text("in the way")
    assert report.main([str(path)]) == 2
    assert "can't be written" in capsys.readouterr().err


def test_the_command_prints_the_path_and_loads_no_torch(tmp_path: Path) -> None:
    cells = synthetic.plan(models=TINY, datasets=("cifar10",), lora=((4, 8),), seeds=(1,))
    path = synthetic.write_study(tmp_path / "s", cells)
    code = (
        "import sys; from analysis import report; from analysis.figures import style;"
        "style.PRINT_DPI = 30;"
        "code = report.main([sys.argv[1]]);"
        "print([n for n in ('torch', 'ray', 'pickle5', 'transformers') if n in sys.modules]);"
        "sys.exit(code)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, str(path)], cwd=ROOT, capture_output=True, text=True,
        check=False, timeout=120,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines() == [str(path / "report/report.html"), "[]"]
