"""The decision table: what to use, in plain words, each line with the evidence it stands on."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.special import betaincinv, stdtrit

from analysis.measures import memory
from analysis.statistics import planning
from analysis.statistics.cells import modes_of
from analysis.statistics.pairs import seed_intervals
from analysis.text.wording import between, either, megabytes, plural, signed, span, span_of
from tune_study.folder import names, schema

TOLERANCES = (0.005, 0.01, 0.02)
"""Losses of accuracy (fractions) that a reader may be ready to accept."""
ACCEPT = "You accept a loss of"
"""How the lines of the tolerances begin."""
SMALL_PEAK_SAVING = 0.05
GUESSING = 0.9
"""Of log(classes), the loss of guessing: with more than that in its last epoch, a trial has hardly
learned."""
WORDS = {
    "none": "no quantization",
    "int8": "8 bits per weight",
    "nf4": "4 bits per weight",
    "nf4-dq": "4 bits per weight, constants compressed",
    "fp4": "4 bits per weight (float)",
    "fp4-dq": "4 bits per weight (float), constants compressed",
}


def meaning(treatment: str) -> str:
    """A quantization setting in words."""
    mode = names.mode_in(treatment)
    if mode is None:
        return "unknown mode"
    return WORDS[mode] if mode == treatment else f"{WORDS[mode]}, some layers otherwise"


class Decision(NamedTuple):
    """One line. ``decided`` is False when the data can't tell; ``mode`` is what to use, if any."""

    question: str
    answer: str
    evidence: str
    sample: str
    decided: bool
    mode: str | None = None


def decide(
    trials: pd.DataFrame,
    epochs: pd.DataFrame,
    comparison: pd.DataFrame,
    memory: pd.DataFrame,
    ledger: pd.DataFrame,
    speed: pd.DataFrame,
) -> list[Decision]:
    """The lines of the table, first the tolerances, then memory, speed and stability.

    Args:
        comparison: ``comparison.compare_modes`` of the test accuracy.
        memory, ledger, speed: ``memory.memory_ratios``, ``memory.memory_ledger`` and
            ``ratios.metric_ratios`` of images_per_s.
    """
    return [
        *tolerances(trials, comparison, memory),
        smallest_weights(memory),
        lowest_peak(trials, ledger),
        fastest(speed),
        stability(trials, epochs),
    ]


def tolerances(
    trials: pd.DataFrame, comparison: pd.DataFrame, memory: pd.DataFrame
) -> list[Decision]:
    """A line per tolerance; neighbours that say the same become one."""
    lines = [tolerance(trials, comparison, memory, loss) for loss in TOLERANCES]
    merged = []
    for line, alike in groupby(
        zip(lines, TOLERANCES, strict=True), key=lambda pair: pair[0]._replace(question="")
    ):
        several = either([f"{loss * 100:g}" for _, loss in alike])
        merged.append(line._replace(question=f"{ACCEPT} {several} pp of accuracy"))
    return merged


def tolerance(
    trials: pd.DataFrame, comparison: pd.DataFrame, memory: pd.DataFrame, loss: float
) -> Decision:
    """The smallest mode that loses less than ``loss`` with 95 % confidence, one-sided.

    That is the non-inferiority test of ``comparison.compare_modes`` at this margin.
    """
    question = f"{ACCEPT} {loss * 100:g} pp of accuracy"
    rows = {str(row["quantization"]): row for row in comparison.to_dict("records")}
    modes = _by_size(list(rows), memory)
    if not modes:
        return Decision(question, "Not decided: no quantized mode was tried", "", "", False)
    bounds = {mode: one_sided(rows[mode]) for mode in modes}
    passing = [m for m in modes if bounds[m][0] > -loss]
    waiting = [m for m in modes if m not in passing and not bounds[m][1] < -loss]
    if passing:
        mode = passing[0]
        answer = f"Use {mode} ({meaning(mode)})"
        smaller = [m for m in waiting if modes.index(m) < modes.index(mode)]
        evidence = f"{mode}: {in_words(trials, rows[mode], loss)}{_size(mode, memory)}"
        needs = _few([_undecided(trials, rows[m], loss) for m in smaller])
        evidence += f". Not decided for smaller weights: {needs}" if needs else ""
        return Decision(question, answer, evidence, _sample(rows[mode]), True, mode)
    evidence = _few([f"{m}: {in_words(trials, rows[m], loss)}" for m in modes])
    if waiting:
        needs = _undecided(trials, rows[waiting[0]], loss)
        return Decision(
            question, f"Not decided: {needs}", evidence, _sample(rows[waiting[0]]), False
        )
    answer = "Use none: every quantized mode loses more"
    return Decision(question, answer, evidence, _sample(rows[modes[0]]), True, "none")


def _few(parts: Sequence[str], joint: str = "; ", most: int = 5) -> str:
    """The parts, the first of many treatments only: the chapters have a row for each."""
    if len(parts) > most:
        parts = [*parts[: most - 1], f"{len(parts) - most + 1} more below"]
    return joint.join(parts)


def one_sided(row: dict[Any, Any]) -> tuple[float, float]:
    """Lower and upper one-sided bound of a mean difference, at the row's ``confidence`` each.

    Recovered from the two-sided t-interval; NaN without one.
    """
    freedom = max(int(row["n_configurations"]) - 1, 1)
    confidence = float(row["confidence"])
    half = (row["ci_high"] - row["ci_low"]) / 2
    reach = half * stdtrit(freedom, confidence) / stdtrit(freedom, 0.5 + confidence / 2)
    return float(row["mean_difference"] - reach), float(row["mean_difference"] + reach)


def in_words(trials: pd.DataFrame, row: dict[Any, Any], loss: float) -> str:
    """``−0.12 pp; with 95 % confidence it loses at most 0.30 pp``, or why that can't be said."""
    if not np.isfinite(row["mean_difference"]):
        return "no finished pair with the unquantized baseline"
    text = f"{signed(row['mean_difference'] * 100)} pp on average"
    low, high = one_sided(row)
    if not np.isfinite([low, high]).all():
        return text + _over_seeds(trials, row)
    sure = f"with {float(row['confidence']) * 100:g} % confidence it"
    if high < -loss:
        return f"{text}; {sure} loses at least {-high * 100:.2f} pp"
    if low >= 0:
        return f"{text}; {sure} loses nothing"
    return f"{text}; {sure} loses at most {-low * 100:.2f} pp"


def _over_seeds(trials: pd.DataFrame, row: dict[Any, Any]) -> str:
    """The interval over the seeds of a lone configuration, which is not about any other."""
    if row["n_configurations"] != 1:
        return ", without an interval"
    own = seed_intervals(trials)
    own = own[own["quantization"] == row["quantization"]]
    low, high = float(own["ci_low"].iloc[0]), float(own["ci_high"].iloc[0])
    if not np.isfinite([low, high]).all():
        return " in this one configuration, without an interval"
    seeds = plural(own["n_seeds"].iloc[0], "seed")
    return f" in this one configuration ({between(low, high, scale=100)} over its {seeds})"


def _by_size(modes: Sequence[str], memory: pd.DataFrame) -> list[str]:
    """Modes, fewest base-weight bytes first; the schema's order, reversed, where unknown."""
    size = memory.groupby("quantization", observed=True)["of_fp32"].mean().to_dict()
    reverse = {mode: -place for place, mode in enumerate(names.in_order(modes))}
    return sorted(modes, key=lambda m: (size.get(m, np.inf), reverse.get(m, 0)))


def _size(mode: str, memory: pd.DataFrame) -> str:
    own = memory[memory["quantization"] == mode]
    if own.empty:
        return ""
    fp32, half = span_of(1 - own["of_fp32"], 0), span_of(1 - own["of_16bit"], 0)
    return f"; base weights {fp32} smaller than at fp32, {half} than at 16 bit"


def _sample(row: dict[Any, Any]) -> str:
    """``12 configurations, 36 pairs of trials``."""
    return f"{plural(row['n_configurations'], 'configuration')}, {plural(row['n_pairs'], 'pair')}"


def _undecided(trials: pd.DataFrame, row: dict[Any, Any], loss: float) -> str:
    """``nf4 seems to lose less; about 4 more seeds would tell``, or what else it needs."""
    mode = row["quantization"]
    more = planning.more_needed(trials, str(mode), loss)
    seems = f"{mode} seems to lose {'less' if row['mean_difference'] > -loss else 'more'}; about"
    if more.seeds is not None:
        return f"{seems} {plural(more.seeds, 'more seed')} per configuration would tell"
    if more.configurations is not None:
        what = plural(more.configurations, "more configuration")
        return f"{seems} {what} would tell (seeds alone won't)"
    return f"{mode} {more.note}"


def smallest_weights(memory: pd.DataFrame) -> Decision:
    """The mode with the fewest base-weight bytes: exact, so without an interval."""
    question = "The base weights must be small (disk, sending, inference)"
    if memory.empty:
        return Decision(question, "Not known: no trial recorded its weights", "", "", False)
    mode = _by_size(modes_of(memory["quantization"]), memory)[0]
    own = memory[memory["quantization"] == mode].drop_duplicates("model")
    sizes = "; ".join(_size_in_words(row) for row in own.head(3).to_dict("records"))
    return Decision(question, f"Use {mode}", sizes, "exact, from the tensors", True, mode)


def _size_in_words(row: dict[Any, Any]) -> str:
    text = f"{row['model']}: {megabytes(row['weights_bytes'])}"
    if row["of_fp32"] >= 1:
        return text
    fp32, half = megabytes(row["weights_bytes_fp32"]), megabytes(row["weights_bytes_16bit"])
    return (
        f"{text} instead of {fp32} at fp32 (−{(1 - row['of_fp32']) * 100:.0f} %) or "
        f"{half} at 16 bit ({signed((row['of_16bit'] - 1) * 100, 0)} %)"
    )


def lowest_peak(trials: pd.DataFrame, ledger: pd.DataFrame) -> Decision:
    """Whether quantization lowers the peak of a training step, from the measured peaks."""
    question = "Training must need less memory"
    shares = memory.peak_ratios(ledger, trials)
    if shares.empty:
        return Decision(
            question, "Not measured on this machine", memory.why_no_peak(ledger), "", False
        )
    by_mode = shares.groupby("quantization", observed=True)["ratio"].mean()
    mode = str(by_mode.idxmin())
    own = shares[shares["quantization"] == mode]
    saving = 1 - float(by_mode.min())
    activations = own["activation_share"].dropna()
    change = span_of(own["ratio"] - 1, 1, sign=True)
    evidence = f"{mode}: peak of a training step {change} against none"
    if len(activations):
        evidence += f"; activations are {span_of(activations, 0)} of that peak"
    sources = ", ".join(sorted({str(source) for source in own["peak_source"] if source}))
    sample = f"{plural(own['n'].sum(), 'trial')}; measured by: {sources or 'not said'}"
    if saving <= 0:
        answer, chosen = "Quantization does not lower the peak", "none"
    elif saving < SMALL_PEAK_SAVING:
        answer, chosen = "Use a smaller batch: quantization hardly lowers the peak", mode
    else:
        answer, chosen = f"Use {mode}", mode
    return Decision(question, answer, evidence, sample, True, chosen)


def fastest(speed: pd.DataFrame) -> Decision:
    """The mode that trains the most images per second."""
    question = "Training must be fast"
    known = speed[speed["ratio"].notna()] if len(speed) else speed
    if known.empty:
        return Decision(question, "Not known: no finished pair recorded its speed", "", "", False)
    intervals = known[["ci_low", "ci_high"]].notna().all(axis=1)
    texts = [
        f"{row['quantization']} {row['ratio']:.2f}"
        + (f" ({span(row['ci_low'], row['ci_high'], 2)})" if has else "")
        for row, has in zip(known.to_dict("records"), intervals, strict=True)
    ]
    best = max(known.to_dict("records"), key=lambda row: row["ratio"])
    sample = _sample(best)
    evidence = f"images per second, as a multiple of none: {_few(texts, ', ')}"
    if (known["ci_high"] < 1).all():
        return Decision(question, "Use none", evidence, sample, True, "none")
    if best["ci_low"] > 1:
        mode = str(best["quantization"])
        return Decision(question, f"Use {mode}", evidence, sample, True, mode)
    answer = "Not decided: the speeds can't be told apart"
    if not intervals.any():
        answer = "Not decided: the pairs give no interval"
    return Decision(question, answer, evidence, sample, False)


def stability(trials: pd.DataFrame, epochs: pd.DataFrame) -> Decision:
    """How many trials of each mode diverged, with an exact upper bound on the rate, and how many
    hardly learned."""
    question = "Training must not break down"
    ended = trials[trials["status"].isin((*schema.GOOD_STATUSES, "diverged"))]
    ended = ended.assign(diverged=ended["status"] == "diverged", flat=hardly_learned(ended, epochs))
    parts = []
    for mode in modes_of(ended["quantization"]):
        own = ended[ended["quantization"] == mode]
        bad, flat = int(own["diverged"].sum()), int(own["flat"].sum())
        bound = diverged_bound(bad, len(own))
        text = f"{mode}: {bad} of {len(own)} diverged (rate below {bound * 100:.0f} %)"
        parts.append((-bad, -flat, text + (f", {flat} hardly learned" if flat else "")))
    if not parts:
        return Decision(question, "Not known: no trial has ended", "", "", False)
    bad, flat = int(ended["diverged"].sum()), int(ended["flat"].sum())
    answer = f"{plural(bad, 'trial')} diverged" if bad else "No trial diverged"
    sample = f"{plural(len(ended), 'trial')}; bounds of 95 %, if trials are independent"
    if flat:
        answer += f", but {plural(flat, 'trial')} hardly learned"
        near = f"a training loss over {GUESSING * 100:.0f} % of that of guessing"
        sample += f"; hardly learned: {near}"
    evidence = _few([text for *_, text in sorted(parts, key=lambda part: part[:2])])
    return Decision(question, answer, evidence, sample, not (bad or flat))


def hardly_learned(trials: pd.DataFrame, epochs: pd.DataFrame) -> pd.Series:
    """Which of ``trials`` ended well with a training loss near that of guessing."""
    last = epochs.sort_values("epoch").groupby("trial_id", observed=True)["train_loss"].last()
    loss = trials["trial_id"].astype(str).map(last).astype("float64")
    guessed = np.log(trials["num_classes"].astype("float64"))
    return trials["status"].isin(schema.GOOD_STATUSES) & (loss > GUESSING * guessed)


def diverged_bound(bad: int, of: int, confidence: float = 0.95) -> float:
    """One-sided exact (Clopper-Pearson) upper bound of a rate of ``bad`` in ``of`` trials."""
    return 1.0 if bad >= of else float(betaincinv(bad + 1, of - bad, confidence))
