"""The pages: links, paths, modules and functions that they name exist; tables are the code's."""

import re
import runpy
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in (
        "*.md",
        "docs/**/*.md",
        "benchmarks/*.md",
        "ray_results/*.md",
        "tune_study/**/*.md",
    )
    for path in ROOT.glob(pattern)
)
TODAY = [page for page in PAGES if page not in ("docs/log.md", "docs/results/report.md")]
"""The pages that speak of the tree as it is; the log names files as they were called that day."""
FILLED = runpy.run_path(str(ROOT / "docs" / "fill.py"))
PACKAGES = "analysis|benchmarks|docs|examples|search_spaces|tests|tune_study"


def text_of(page):
    return (ROOT / page).read_text(encoding="utf-8")


def anchors(page):
    """Of a page's headings, as GitHub makes them."""
    prose = re.sub(r"^```.*?^```", "", text_of(page), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\s-]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_every_relative_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if re.match(r"\w+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path.resolve().relative_to(ROOT).as_posix()), target


@pytest.mark.parametrize("page", TODAY)
def test_every_named_path_exists(page):
    named = re.findall(rf"(?<![\w./-])(?:{PACKAGES})(?:/[\w.-]*\w)+", text_of(page))
    assert [path for path in named if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", TODAY)
def test_every_module_that_is_run_exists(page):
    for module in re.findall(rf"python -m ((?:{PACKAGES})[\w.]*\w)", text_of(page)):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/architecture.md"])
def test_every_named_name_is_defined_in_the_file_beside_it(page):
    file, name = r"[`\[]([\w/]+\.py)(?:`|\]\([^)]*\))", r"`(\w+)(?:\(\))?`"
    found = re.findall(rf"{file}: ({name}(?:(?:, | and | or ){name})*)", text_of(page))
    assert len(found) >= 6
    for path, names, *_ in found:
        source = text_of(path)
        for one in re.findall(r"\w+", names.replace(" and ", " ").replace(" or ", " ")):
            defined = rf"^\s*(def|class) {one}\b|^{one}\b.*="
            assert re.search(defined, source, re.MULTILINE), f"{path}: {one}"


@pytest.mark.parametrize("page", FILLED["PAGES"])
def test_what_comes_from_the_code_is_up_to_date(page):
    """``python docs/fill.py`` writes it anew."""
    assert text_of(page) == FILLED["filled"](text_of(page))


def test_an_option_that_has_a_page_exists():
    options = FILLED["options"]()
    for option in FILLED["MORE"]:
        assert re.search(rf"`{option}[ `]", options), option


def test_the_readme_is_short_and_lists_every_page_once():
    readme = text_of("README.md")
    assert len(readme.splitlines()) <= 90
    table = readme.partition("## What it can do")[2].partition("\n## ")[0]
    for page in PAGES:
        if re.fullmatch(r"docs/[\w-]+\.md|docs/results/README.md", page):
            assert table.count(f"]({page})") == 1, page


def test_the_version_is_one():
    version = tomllib.loads(text_of("pyproject.toml"))["project"]["version"]
    citation = yaml.safe_load(text_of("CITATION.cff"))
    assert str(citation["version"]) == version
    first = re.search(r"^## (\S+)", text_of("CHANGELOG.md"), re.MULTILINE)
    assert first is not None
    assert first[1] == version


def test_the_hooks_are_the_lints_of_ci():
    (repo,) = yaml.safe_load(text_of(".pre-commit-config.yaml"))["repos"]
    hooks = [hook["entry"].split() for hook in repo["hooks"]]
    commands = [line.split() for line in text_of(".ci/run").splitlines()]
    lints = commands[commands.index(["ruff", "check", "."]) :]
    assert len(hooks) == 5
    for hook, lint in zip(hooks, lints, strict=False):
        assert lint[: len(hook)] == hook
