"""How many seeds does a study need to see an effect, or to show equivalence?

    python -m analysis.power --grid full --effect 0.01 --margin 0.01

Simulated, without ray or torch. The difference of one configuration's pair is

    effect + v + e,   v ~ N(0, configuration sd),   e ~ N(0, sqrt(2) * seed sd)

where ``v`` is how much the effect differs between configurations, and the seed sd is the noise of
one trial that its partner does not share. The analysis is the primary one: a t-test or two
one-sided t-tests over the configuration means of k seeds, whose sd is sqrt(configuration sd^2 +
2 seed sd^2 / k). More seeds shrink the second part only.

The defaults (configuration sd 0.005, seed sd 0.004: half a point and 0.4 points of accuracy) are
assumptions in the range that seeds of small fine-tuned classifiers show, not measurements; with
``--study`` both are estimated from a finished study.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.special import stdtrit

from analysis.load import StudyError, read_study, told
from analysis.statistics.cells import units
from analysis.statistics.pairs import paired_differences

GRIDS = {"full": 12, "demo": 3, "smoke": 1, "sensitivity": 1}
"""Configurations (all but quantization and seed) of the named grids, as ``--dry-run`` counts."""
CONFIGURATION_SD = 0.005
SEED_SD = 0.004
MAX_SEEDS = 50
MAX_CONFIGURATIONS = 200
MAX_DRAWS = 10**8
SHOWN = (1, 2, 3, 4, 5, 6, 8, 10, 15, 20, 30, 50)
CLAIMS = {
    "power_see": "see the effect (one mode alone)",
    "power_see_holm": "see the effect (corrected for the modes)",
    "power_equivalent": "show equivalence (no true effect)",
    "power_not_inferior": "show non-inferiority (no true effect)",
}


class Spread(NamedTuple):
    """Standard deviations in the metric's unit (fractions), and where they come from."""

    configuration_sd: float
    seed_sd: float
    n_configurations: int
    source: str


def power_table(
    n_configurations: int,
    *,
    effect: float,
    margin: float,
    configuration_sd: float = CONFIGURATION_SD,
    seed_sd: float = SEED_SD,
    seeds: tuple[int, ...] = tuple(range(1, MAX_SEEDS + 1)),
    confidence: float = 0.95,
    modes: int = 3,
    simulations: int = 20_000,
    rng: np.random.Generator | None = None,
) -> pd.DataFrame:
    """Power per number of seeds, each a share of ``simulations`` simulated studies.

    Columns: seeds, sd (of a configuration's mean difference), ``power_see`` (two-sided t, alpha =
    1 - confidence), ``power_see_holm`` (alpha / modes, Holm's first step: the least favourable
    case), ``power_equivalent`` and ``power_not_inferior`` (one-sided alpha each, no true effect),
    mc_error (the largest standard error of a share). The same draws serve every row, so power does
    not wobble along the column. Raises ``StudyError`` for values that can't be meant.
    """
    _require_plan(n_configurations, modes, simulations)
    _require_sizes(effect, margin, configuration_sd, seed_sd, confidence)
    rng = np.random.default_rng(0) if rng is None else rng
    means, errors = _standard_draws(n_configurations, simulations, rng)
    alpha, freedom = 1 - confidence, n_configurations - 1
    two_sided, one_sided, holm = (
        float(stdtrit(freedom, 1 - level)) for level in (alpha / 2, alpha, alpha / 2 / modes)
    )
    rows = []
    for count in seeds:
        sd = float(np.sqrt(configuration_sd**2 + 2 * seed_sd**2 / count))
        t = np.abs(means + effect / sd) / errors
        above = (means + margin / sd) / errors > one_sided
        below = (margin / sd - means) / errors > one_sided
        shares = {
            "power_see": np.mean(t > two_sided),
            "power_see_holm": np.mean(t > holm),
            "power_equivalent": np.mean(above & below),
            "power_not_inferior": np.mean(above),
        }
        error = max(np.sqrt(p * (1 - p) / simulations) for p in shares.values())
        rows.append({"seeds": count, "sd": sd, **shares, "mc_error": error})
    return pd.DataFrame(rows)


def _require_plan(n_configurations: int, modes: int, simulations: int) -> None:
    _require(n_configurations >= 2, "configurations", n_configurations, "a t-test needs two")
    _require(1 <= modes <= 1000, "modes", modes, "use 1 to 1000")
    _require(simulations >= 100, "simulations", simulations, "use 1000 or more")
    draws = simulations * n_configurations
    _require(draws <= MAX_DRAWS, "simulations x configurations", draws, f"use up to {MAX_DRAWS:,}")


def _require_sizes(
    effect: float, margin: float, configuration_sd: float, seed_sd: float, confidence: float
) -> None:
    _require(0.5 <= confidence < 1, "confidence", confidence, "use e.g. 0.95")
    _require(0 < margin <= 1, "margin", margin, "use e.g. 0.01 for 1 pp")
    _require(0 < abs(effect) <= 1, "effect", effect, "use e.g. 0.01 for 1 pp")
    _require(0 <= configuration_sd <= 1, "configuration sd", configuration_sd, "use e.g. 0.005")
    _require(0 <= seed_sd <= 1, "seed sd", seed_sd, "use e.g. 0.004")
    _require(configuration_sd + seed_sd >= 1e-6, "seed sd", seed_sd, "one sd must be above 1e-6")


def _standard_draws(
    n: int, simulations: int, rng: np.random.Generator
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Mean and standard error of n standard normal configuration means, per simulated study."""
    draws = rng.standard_normal((simulations, n))
    return draws.mean(axis=1), draws.std(axis=1, ddof=1) / np.sqrt(n)


def _require(holds: bool | np.bool_, what: str, value: float, remedy: str) -> None:
    if not holds:
        raise StudyError(f"{what} = {value}: {remedy}")


def seeds_needed(table: pd.DataFrame, claim: str, power: float = 0.8) -> int | None:
    """The fewest seeds of ``table`` with that power for a column of ``CLAIMS``, or ``None``."""
    enough = table.loc[table[claim] >= power, "seeds"]
    return None if enough.empty else int(enough.min())


def configurations_needed(claim: str, power: float, *, seeds: int, **model: Any) -> int | None:
    """The fewest configurations with that power at ``seeds`` seeds, up to 200, or ``None``.

    ``model`` goes to :func:`power_table`. 4,000 simulations: good to about one configuration in
    twenty.
    """

    def suffices(n: int) -> bool:
        table = power_table(n, seeds=(seeds,), simulations=4_000, **model)
        return bool(table[claim].iloc[0] >= power)

    low, high = 1, MAX_CONFIGURATIONS
    if not suffices(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if suffices(middle) else (middle, high)
    return high


def spread_of(trials: pd.DataFrame, metric: str = "test_accuracy") -> Spread:
    """Both sds and the number of configurations from a study's matched differences to ``none``.

    One-way analysis of variance per mode, pooled: the mean square within configurations is
    2 seed_sd^2, that of configuration means minus its seed part is configuration_sd^2 (0 when
    negative). With one seed per configuration the seed sd can't be told and is the default.
    Raises ``StudyError`` with fewer than two configurations.
    """
    pairs = paired_differences(trials, metric=metric)
    cells = pairs.groupby(["configuration", "quantization"])["difference"]
    table = units(trials).merge(cells.agg(["size", "mean", "var"]).reset_index())
    n = table.groupby("quantization").size()
    if n.empty or n.max() < 2:
        count = 0 if n.empty else int(n.max())
        raise StudyError(
            f"the study has matched pairs in {count} configuration(s), and two are needed: "
            "give --configurations, --configuration-sd and --seed-sd instead"
        )
    freedom = (table["size"] - 1).sum()
    source = "estimated from the study"
    if freedom:
        within = float((table["var"].fillna(0) * (table["size"] - 1)).sum() / freedom)
    else:
        within = 2 * SEED_SD**2
        source = f"estimated from the study; its one seed can't tell the seed sd, {SEED_SD} assumed"
    by_mode = table.groupby("quantization")["mean"]
    between = float((by_mode.var() * (n - 1)).sum() / (n - 1).sum())
    seeds = float(1 / (1 / table["size"]).mean())
    configuration_sd = float(np.sqrt(max(0.0, between - within / seeds)))
    return Spread(configuration_sd, float(np.sqrt(within / 2)), int(n.max()), source)


def report(table: pd.DataFrame, spread: Spread, power: float, model: dict[str, Any]) -> str:
    """The table in words, and how many seeds each claim needs; ``model`` made the table."""
    lines = [
        f"{spread.n_configurations} configurations, {model['modes']} mode(s) against the baseline; "
        f"configuration sd {100 * spread.configuration_sd:.2f} pp, seed sd "
        f"{100 * spread.seed_sd:.2f} pp ({spread.source})",
        f"effect {100 * model['effect']:g} pp, margin {100 * model['margin']:g} pp; power, by "
        f"simulation (standard error up to {table['mc_error'].max():.3f}):",
        "",
        f"{'seeds':>5}  {'see it':>7}  {'see it, Holm':>12}  {'equivalent':>10}  "
        f"{'not inferior':>12}",
    ]
    for row in table[table["seeds"].isin(SHOWN)].to_dict("records"):
        lines.append(
            f"{row['seeds']:>5}  {row['power_see']:>7.2f}  {row['power_see_holm']:>12.2f}  "
            f"{row['power_equivalent']:>10.2f}  {row['power_not_inferior']:>12.2f}"
        )
    lines += ["", f"for a power of {power:g}:"]
    return "\n".join(lines + [_need(table, claim, power, model) for claim in CLAIMS])


def _need(table: pd.DataFrame, claim: str, power: float, model: dict[str, Any]) -> str:
    seeds = seeds_needed(table, claim, power)
    if seeds is not None:
        return f"  to {CLAIMS[claim]}: {seeds} seed(s) per configuration"
    more = configurations_needed(claim, power, seeds=3, **model)
    hope = (
        f"about {more} configurations with 3 seeds"
        if more is not None
        else f"not even {MAX_CONFIGURATIONS} configurations with 3 seeds do"
    )
    most = int(table["seeds"].max())
    return f"  to {CLAIMS[claim]}: more than {most} seeds; needs more configurations: {hope}"


def _spread(options: argparse.Namespace) -> Spread:
    """From the options, the study where given, and the defaults, in that order."""
    if options.study is not None:
        spread = spread_of(read_study(options.study).trials)
    else:
        known = GRIDS.get(options.grid)
        if known is None and options.configurations is None:
            raise StudyError(
                f"--grid {options.grid}: known here are {', '.join(GRIDS)}; give --configurations "
                "N, as python -m tune_study.run --dry-run counts them"
            )
        spread = Spread(CONFIGURATION_SD, SEED_SD, known or 0, "assumed")
    given = {
        "configuration_sd": options.configuration_sd,
        "seed_sd": options.seed_sd,
        "n_configurations": options.configurations,
    }
    spread = spread._replace(**{key: v for key, v in given.items() if v is not None})
    if options.configuration_sd is not None and options.seed_sd is not None:
        return spread._replace(source="as given")
    return spread


def _told(options: argparse.Namespace) -> str:
    _require(0 < options.power < 1, "--power", options.power, "use e.g. 0.8")
    spread = _spread(options)
    model = {
        "effect": options.effect, "margin": options.margin, "modes": options.modes,
        "configuration_sd": spread.configuration_sd, "seed_sd": spread.seed_sd,
    }  # fmt: skip
    table = power_table(spread.n_configurations, simulations=options.simulations, **model)
    return report(table, spread, options.power, model)


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit status: 2 for the user's mistake."""
    parser = argparse.ArgumentParser(
        prog="python -m analysis.power",
        description=(__doc__ or "").splitlines()[0],
        epilog="All sizes are fractions: 0.01 is one percentage point of accuracy.",
    )
    add = parser.add_argument
    add("--grid", default="full", help="named grid, for its number of configurations (full = 12)")
    add(
        "--configurations",
        type=int,
        help="their number, as --dry-run of the study counts them",
    )
    add("--study", help="study folder to take configurations and sds from")
    add("--effect", type=float, default=0.01, help="effect to see (default 0.01 = 1 pp)")
    add("--margin", type=float, default=0.01, help="margin of equivalence (default 0.01)")
    add("--configuration-sd", type=float, help=f"sd of effects (default {CONFIGURATION_SD})")
    add("--seed-sd", type=float, help=f"sd of one trial's own noise (default {SEED_SD})")
    add("--modes", type=int, default=3, help="modes compared with the baseline (default 3)")
    add("--power", type=float, default=0.8, help="wanted power (default 0.8)")
    add("--simulations", type=int, default=20_000, help="simulated studies (default 20000)")
    options = parser.parse_args(arguments)
    return told(lambda: _told(options), "the study can't be read")


if __name__ == "__main__":
    sys.exit(main())
