"""The decision table: what it recommends, and when it refuses to."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis.findings import decisions
from analysis.folder.configurations import SHORT
from analysis.measures import memory
from analysis.statistics import planning, ratios
from analysis.statistics.comparison import compare_modes
from analysis.statistics.pairs import paired_differences
from tests import synthetic

TINY = ("deit_tiny_patch16_224",)


def _decide(
    trials: pd.DataFrame, epochs: pd.DataFrame | None = None
) -> dict[str, decisions.Decision]:
    ledger = memory.memory_ledger(trials)
    lines = decisions.decide(
        trials,
        synthetic.study_frames()[1] if epochs is None else epochs,
        compare_modes(trials),
        memory.memory_ratios(trials),
        ledger,
        ratios.metric_ratios(trials, metric="images_per_s"),
    )
    return {line.question: line for line in lines}


def _tolerance(trials: pd.DataFrame, loss: float) -> decisions.Decision:
    return decisions.tolerance(trials, compare_modes(trials), memory.memory_ratios(trials), loss)


def test_the_smallest_mode_that_loses_little_is_chosen() -> None:
    trials, _ = synthetic.study_frames(effects={"nf4": -0.03, "nf4-dq": -0.03, "int8": -0.007})
    assert _tolerance(trials, 0.05).mode == "nf4-dq"
    one = _tolerance(trials, 0.01)
    assert (one.mode, one.decided) == ("int8", True)
    assert "12 configurations, 36 pairs" in one.sample
    none = _tolerance(trials, 0.002)
    assert (none.mode, none.decided) == ("none", True)
    assert "loses at least" in none.evidence


def _exact(seeds: int, mean: float, sigma: float) -> pd.DataFrame:
    """Six configurations whose nf4 differences have this mean and sd over seeds, exactly."""
    cells = synthetic.plan(models=TINY, modes=("none", "nf4"), seeds=range(seeds))
    trials, _ = synthetic.study_frames(cells)
    spread = np.linspace(-1, 1, seeds)
    differences = mean + sigma * spread / spread.std(ddof=1)
    trials["test_accuracy"] = 0.9
    nf4 = trials["quantization"] == "nf4"
    trials.loc[nf4, "test_accuracy"] += differences[trials.loc[nf4, "seed"].to_numpy("int64")]
    # The configurations must differ a little, or there is no interval at all.
    trials.loc[nf4, "test_accuracy"] += trials.loc[nf4, "lora_r"].astype("float64") * 1e-4
    return trials


def test_a_wide_interval_is_not_decided_and_says_what_it_needs() -> None:
    trials, _ = synthetic.study_frames(synthetic.plan(models=TINY, modes=("none", "nf4")))
    swing = np.where(trials["lora_r"] == 4, -0.04, 0.01)  # a third of them: -0.67 pp on average
    for shift, seems in ((0, "less"), (-0.01, "more")):
        quantized = 0.9 + swing + shift
        trials["test_accuracy"] = np.where(trials["quantization"] == "nf4", quantized, 0.9)
        line = _tolerance(trials, 0.01)
        assert (line.mode, line.decided) == (None, False)
        assert line.answer.startswith(f"Not decided: nf4 seems to lose {seems}; about ")
        assert "more configurations would tell" in line.answer


def test_insignificance_is_never_called_no_effect() -> None:
    trials, _ = synthetic.study_frames(seed_sd=0.05, rng_seed=4)
    found = compare_modes(trials).set_index("quantization")
    assert found.loc["nf4-dq", "p_holm"] > 0.2
    line = _tolerance(trials, 0.005)
    assert line.mode != "nf4-dq"
    text = " ".join(part for one in _decide(trials).values() for part in one[:4])
    assert "no effect" not in text.lower()
    assert "Not decided for smaller weights: nf4-dq seems to lose " in text


def test_tolerance_is_the_noninferiority_test_at_that_margin() -> None:
    for seed in range(12):
        trials, _ = synthetic.study_frames(
            synthetic.plan(modes=("none", "nf4")), effects={"nf4": -0.008}, rng_seed=seed
        )
        found = compare_modes(trials, margin=0.01).iloc[0]
        line = _tolerance(trials, 0.01)
        assert (line.mode == "nf4") == (found["p_noninferior"] < 0.05)


def test_one_sided_bound_against_scipy() -> None:
    trials, _ = synthetic.study_frames(synthetic.plan(modes=("none", "nf4")))
    row = compare_modes(trials).to_dict("records")[0]
    pairs = paired_differences(trials)
    means = pairs.groupby(list(SHORT))["difference"].mean()
    low, high = stats.t.interval(0.90, 11, means.mean(), stats.sem(means))
    assert decisions.one_sided(row) == pytest.approx((low, high))


def test_one_configuration_gets_an_interval_over_seeds_and_no_decision() -> None:
    cells = synthetic.plan(models=TINY, datasets=("cifar10",), lora=((4, 8),))
    trials, _ = synthetic.study_frames(cells)
    line = _tolerance(trials, 0.02)
    assert not line.decided
    assert "in this one configuration" in line.evidence
    assert "over its 3 seeds" in line.evidence
    assert "another model, data set, rank or setting" in line.answer


def test_planned_seeds_decide_as_often_as_promised() -> None:
    """With the promised number of seeds, about 80 % of studies decide (checked by simulation)."""
    more = planning.more_needed(_exact(2, -0.005, 0.02), "nf4", 0.01)
    assert more.seeds is not None
    seeds = 2 + more.seeds
    rng = np.random.default_rng(5)
    mean = -0.005 + 1e-4 * np.mean([4, 8, 16])
    means = rng.normal(mean, 0.02 / seeds**0.5, size=(4000, 6))
    p = stats.ttest_1samp(means, -0.01, axis=1, alternative="greater").pvalue
    assert np.mean(p < 0.05) == pytest.approx(0.8, abs=0.05)


def test_more_seeds_do_not_help_against_differing_configurations() -> None:
    trials, _ = synthetic.study_frames(
        synthetic.plan(modes=("none", "nf4"), lora=((4, 8),)), effects={"nf4": -0.004},
        seed_sd=0.0005, configuration_sd=0.02, rng_seed=1,
    )  # fmt: skip
    more = planning.more_needed(trials, "nf4", 0.01)
    assert more.seeds is None
    assert more.configurations is not None


def test_equal_lines_are_merged() -> None:
    trials, _ = synthetic.study_frames()
    questions = list(_decide(trials))
    assert questions[0] == "You accept a loss of 0.5, 1 or 2 pp of accuracy"


def test_weights_name_both_baselines() -> None:
    trials, _ = synthetic.study_frames(synthetic.plan(models=TINY))
    line = next(x for q, x in _decide(trials).items() if "base weights" in q)
    assert line.mode == "nf4-dq"
    assert (
        "3.66 MB instead of 22.1 MB at fp32 (−83 %) or 11.1 MB at 16 bit (−67 %)" in line.evidence
    )


def test_a_peak_that_hardly_moves_is_not_sold_as_a_saving() -> None:
    trials, _ = synthetic.study_frames()
    line = next(x for q, x in _decide(trials).items() if "less memory" in q)
    assert line.answer == "Use a smaller batch: quantization hardly lowers the peak"
    assert "against none" in line.evidence
    assert "profiler" in line.sample


def test_a_peak_that_falls_is_recommended() -> None:
    trials, _ = synthetic.study_frames(synthetic.plan(models=TINY))
    trials.loc[trials["quantization"] == "int8", "peak_train_bytes"] //= 2
    line = next(x for q, x in _decide(trials).items() if "less memory" in q)
    assert (line.answer, line.mode) == ("Use int8", "int8")


def test_an_unmeasured_peak_says_why() -> None:
    trials, _ = synthetic.study_frames(missing=("peak_train_bytes",))
    trials["peak_source"] = "this device keeps no statistics"
    line = next(x for q, x in _decide(trials).items() if "less memory" in q)
    assert (line.decided, line.evidence) == (False, "this device keeps no statistics")


def test_speed_is_decided_only_when_intervals_are_apart() -> None:
    trials, _ = synthetic.study_frames()
    line = next(x for q, x in _decide(trials).items() if "fast" in q)
    assert line.answer == "Not decided: the pairs give no interval"  # all ratios are the same
    rng = np.random.default_rng(0)
    trials["images_per_s"] *= rng.normal(1, 0.01, len(trials))
    line = next(x for q, x in _decide(trials).items() if "fast" in q)
    assert (line.mode, line.decided) == ("none", True)
    trials["images_per_s"] = rng.normal(400, 40, len(trials))
    line = next(x for q, x in _decide(trials).items() if "fast" in q)
    assert not line.decided


def test_divergence_is_counted_with_an_exact_bound() -> None:
    trials, _ = synthetic.study_frames(failures={4: "diverged"})
    line = next(x for q, x in _decide(trials).items() if "break down" in q)
    assert line.answer == "1 trial diverged"
    assert not line.decided
    # Clopper-Pearson by its definition: P(X <= bad | bound) = 5 %.
    bound = decisions.diverged_bound(1, 36)
    assert stats.binom.cdf(1, 36, bound) == pytest.approx(0.05)
    assert decisions.diverged_bound(0, 36) == pytest.approx(1 - 0.05 ** (1 / 36))
    assert decisions.diverged_bound(3, 3) == 1


def test_a_trial_that_hardly_learned_is_no_calm_one() -> None:
    """Its loss is finite, so that it has not diverged; it guesses all the same."""
    trials, epochs = synthetic.study_frames()
    question = "Training must not break down"
    assert "learned" not in "".join(_decide(trials, epochs)[question][1:4])
    flat = trials[(trials["quantization"] == "nf4") & (trials["dataset"] == "cifar100")].iloc[:2]
    last = epochs["epoch"] == epochs.groupby("trial_id")["epoch"].transform("max")
    own = epochs["trial_id"].isin(flat["trial_id"])
    epochs.loc[own & last, "train_loss"] = 0.91 * np.log(100)
    line = _decide(trials, epochs)[question]
    assert line.answer == "No trial diverged, but 2 trials hardly learned"
    assert line.evidence.startswith("nf4: 0 of 36 diverged (rate below 8 %), 2 hardly learned; ")
    assert "hardly" not in line.evidence.removeprefix(line.evidence.split("; ")[0])
    assert not line.decided
    epochs.loc[own & last, "train_loss"] = 0.89 * np.log(100)
    epochs.loc[own & ~last, "train_loss"] = np.log(100)  # earlier epochs do not count
    assert _decide(trials, epochs)[question].decided


def test_nothing_finished_decides_nothing() -> None:
    cells = synthetic.plan(models=TINY)
    trials, _ = synthetic.study_frames(cells, failures=dict.fromkeys(range(len(cells)), "pending"))
    lines = _decide(trials)
    assert len(lines) == 5
    assert not any(line.decided for line in lines.values())


def test_a_plan_rests_on_the_pairs_of_the_comparison() -> None:
    """A repeated baseline trial is averaged: the plan is that of the averaged table."""
    trials = _exact(3, -0.005, 0.02)
    none = trials["quantization"] == "none"
    off = np.where(trials["seed"] == 0, 0.03, 0.0)[none]
    lower = trials[none].assign(test_accuracy=trials.loc[none, "test_accuracy"] - off)
    higher = trials[none].assign(test_accuracy=trials.loc[none, "test_accuracy"] + off)
    repeated = pd.concat([lower, higher, trials[~none]], ignore_index=True)
    expected = planning.more_needed(trials, "nf4", 0.01)
    assert planning.more_needed(repeated, "nf4", 0.01) == expected


def test_the_baseline_is_fastest_only_when_every_mode_is_slower() -> None:
    def answer(*intervals: tuple[float, float]) -> str:
        rows = [
            {"quantization": mode, "ratio": (low + high) / 2, "ci_low": low, "ci_high": high}
            for mode, (low, high) in zip(("int8", "nf4"), intervals, strict=True)
        ]
        sizes = {"n_configurations": 2, "n_pairs": 4}
        return decisions.fastest(pd.DataFrame(rows).assign(**sizes)).answer

    assert answer((0.7, 0.9), (0.8, 0.95)) == "Use none"
    assert answer((0.7, 0.9), (1.1, 1.3)) == "Use nf4"
    assert answer((0.7, 0.9), (0.9, 1.3)).startswith("Not decided")


def test_of_many_treatments_a_line_names_a_few() -> None:
    cells = synthetic.plan(models=synthetic.MODELS[:1], datasets=("cifar10",))
    trials, _ = synthetic.study_frames(cells, failures={5: "diverged"})
    other = trials[trials["quantization"] != "none"]
    copies = [
        other.assign(
            quantization=other["quantization"] + f" without blocks {i}",
            trial_id=other["trial_id"] + str(i),
        )
        for i in range(3)
    ]
    many = pd.concat([trials, *copies], ignore_index=True)
    line = decisions.stability(many, synthetic.study_frames()[1])
    assert line.answer == "4 trials diverged"
    assert line.evidence.startswith("int8: 1 of 9 diverged")
    assert line.evidence.count("diverged") == 4
    assert line.evidence.endswith("; 9 more below")
