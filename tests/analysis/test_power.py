"""Simulated power against the noncentral t distribution, and the command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from analysis import power
from analysis.folder.configurations import SHORT
from analysis.load import StudyError
from analysis.statistics.pairs import paired_differences
from tests import synthetic


def exact(n: int, sd: float, effect: float, alpha: float = 0.05) -> float:
    """Power of the two-sided t-test of n normal values."""
    reach, shift = stats.t.ppf(1 - alpha / 2, n - 1), effect / sd * np.sqrt(n)
    return stats.nct.sf(reach, n - 1, shift) + stats.nct.cdf(-reach, n - 1, shift)


def test_power_to_see_is_that_of_the_noncentral_t() -> None:
    table = power.power_table(
        12, effect=-0.006, margin=0.01, configuration_sd=0.006, seed_sd=0.008, seeds=(1, 2, 5)
    ).set_index("seeds")
    for seeds in (1, 2, 5):
        sd = np.sqrt(0.006**2 + 2 * 0.008**2 / seeds)
        assert table.loc[seeds, "sd"] == pytest.approx(sd)
        tolerance = 4 * table.loc[seeds, "mc_error"]
        row = table.loc[seeds]
        assert row["power_see"] == pytest.approx(exact(12, sd, 0.006), abs=tolerance)
        holm = exact(12, sd, 0.006, alpha=0.05 / 3)
        assert row["power_see_holm"] == pytest.approx(holm, abs=tolerance)


@pytest.mark.parametrize(
    ("sd", "expected"), [(0.008, 0.98), (0.010, 0.89), (0.012, 0.71), (0.015, 0.41)]
)
def test_equivalence_agrees_with_the_published_simulation(sd: float, expected: float) -> None:
    """literature-figures.md: TOST at 1 pp, 12 configurations, no true difference."""
    table = power.power_table(
        12, effect=0.01, margin=0.01, configuration_sd=sd, seed_sd=0, seeds=(1,)
    )
    assert table["power_equivalent"].iloc[0] == pytest.approx(expected, abs=0.015)


@pytest.mark.parametrize(("dz", "claim"), [(0.89, "power_see"), (1.08, "power_see_holm")])
def test_eighty_percent_power_needs_the_published_effect_size(dz: float, claim: str) -> None:
    table = power.power_table(
        12, effect=0.01 * dz, margin=0.01, configuration_sd=0.01, seed_sd=0, seeds=(1,)
    )
    assert table[claim].iloc[0] == pytest.approx(0.80, abs=0.015)


def test_power_grows_with_seeds_and_needs_are_its_first_crossing() -> None:
    table = power.power_table(6, effect=0.008, margin=0.01, configuration_sd=0.003, seed_sd=0.01)
    assert (table.filter(like="power_").diff().dropna() >= 0).all(axis=None)
    needed = power.seeds_needed(table, "power_see", 0.8)
    assert needed is not None
    by_seeds = table.set_index("seeds")["power_see"]
    assert by_seeds[needed - 1] < 0.8 <= by_seeds[needed]
    assert power.seeds_needed(table, "power_see", 1.01) is None


def test_more_configurations_help_where_seeds_do_not() -> None:
    model = {"effect": 0.005, "margin": 0.01, "configuration_sd": 0.01, "seed_sd": 0.001}
    assert power.seeds_needed(power.power_table(12, **model), "power_see") is None
    needed = power.configurations_needed("power_see", 0.8, seeds=3, **model)
    assert needed is not None
    sd = np.sqrt(0.01**2 + 2 * 0.001**2 / 3)
    assert exact(needed, sd, 0.005) == pytest.approx(0.8, abs=0.03)
    tiny = model | {"effect": 1e-5}
    assert power.configurations_needed("power_see", 0.8, seeds=3, **tiny) is None


def test_spread_is_estimated_from_a_study() -> None:
    got = np.array([
        power.spread_of(
            synthetic.study_frames(
                configuration_sd=0.003, seed_sd=0.006, rng_seed=seed, epochs=1
            )[0]
        )[:3]
        for seed in range(8)
    ])  # fmt: skip
    # Per study 3 x 11 and 3 x 24 degrees of freedom, eight studies; modes share the baseline.
    assert got[:, 0].mean() == pytest.approx(0.003, rel=0.25)
    assert got[:, 1].mean() == pytest.approx(0.006, rel=0.08)
    assert (got[:, 2] == 12).all()


def test_spread_of_one_seed_and_of_one_configuration() -> None:
    trials, _ = synthetic.study_frames(synthetic.plan(seeds=(1,)), epochs=1)
    spread = power.spread_of(trials)
    assert spread.seed_sd == power.SEED_SD
    assert "one seed can't tell" in spread.source
    trials, _ = synthetic.study_frames(
        synthetic.plan(models=("m",), datasets=("cifar10",), lora=((4, 8),)), epochs=1
    )
    with pytest.raises(StudyError, match="1 configuration"):
        power.spread_of(trials)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "analysis.power", *arguments],
        cwd=Path(power.__file__).parents[1],
        capture_output=True,
        text=True,
    )


def test_the_command_of_the_issue() -> None:
    done = run("--grid", "full", "--effect", "0.01", "--margin", "0.01")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("12 configurations")
    assert "to see the effect (one mode alone): 1 seed(s)" in done.stdout
    assert "to show equivalence (no true effect): 1 seed(s)" in done.stdout


def test_the_command_says_when_seeds_do_not_help(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--effect", "0.005", "--configuration-sd", "0.01", "--seed-sd", "0.004"]
    assert power.main([*arguments, "--simulations", "2000"]) == 0
    out = capsys.readouterr().out
    assert "(as given)" in out
    assert "needs more configurations: about" in out


def test_the_command_takes_a_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cells = synthetic.plan(datasets=("cifar10",))
    folder = synthetic.write_study(tmp_path / "s", cells, epochs=1)
    assert power.main(["--study", str(folder), "--simulations", "1000"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("6 configurations")
    assert "estimated from the study" in out
    assert power.main(["--study", str(folder), "--configurations", "20"]) == 0
    assert capsys.readouterr().out.startswith("20 configurations")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--grid", "mine"], "give --configurations N"),
        (["--configurations", "1"], "a t-test needs two"),
        (["--effect", "0"], "effect = 0.0"),
        (["--margin", "-1"], "margin = -1.0"),
        (["--power", "80"], "--power = 80.0"),
        (["--study", "/does/not/exist"], "does not exist"),
    ],
)
def test_mistakes_exit_2_in_one_sentence(
    arguments: list[str], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert power.main(arguments) == 2
    captured = capsys.readouterr()
    assert word in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_the_command_loads_neither_torch_nor_ray() -> None:
    program = (
        "import sys; from analysis import power; power.main(['--simulations', '100'])\n"
        "loaded = {name.partition('.')[0] for name in sys.modules}\n"
        "assert not loaded & {'torch', 'ray'}, loaded"
    )
    root = Path(power.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_seeds_of_unequal_number_count_by_their_harmonic_mean() -> None:
    trials, _ = synthetic.study_frames(epochs=1, configuration_sd=0.02, seed_sd=0.01)
    groups = trials.groupby(list(SHORT)).ngroup()
    trials = trials[(groups % 3 != 0) | (trials["seed"] == trials["seed"].min())]  # 1, 3, 3 seeds
    pairs = paired_differences(trials, metric="test_accuracy")
    within, between, weights = 0.0, 0.0, 0
    seeds = []
    freedom = 0
    for _, of_mode in pairs.groupby("quantization"):
        cells = [cell["difference"].to_numpy() for _, cell in of_mode.groupby(list(SHORT))]
        within += sum(((cell - cell.mean()) ** 2).sum() for cell in cells)
        freedom += sum(len(cell) - 1 for cell in cells)
        means = np.array([cell.mean() for cell in cells])
        between += ((means - means.mean()) ** 2).sum()
        weights += len(cells) - 1
        seeds += [len(cell) for cell in cells]
    by_hand = between / weights - within / freedom / (len(seeds) / sum(1 / n for n in seeds))
    assert set(seeds) == {1, 3}
    assert by_hand > 0
    found = power.spread_of(trials)
    assert found.configuration_sd == pytest.approx(np.sqrt(by_hand))
    assert found.seed_sd == pytest.approx(np.sqrt(within / freedom / 2))
