"""What GradientFlowMonitor, the noise scale and the resource monitor cost, per optimizer step.

    python benchmarks/monitor_overhead.py [MODEL] [MICRO_BATCH] [ROUNDS]

Steps with and without alternate, so that a machine that slows down slows both; the result is the
ratio of the medians. The monitor that is off still computes the norm that clipping needs, as any
training loop does.
"""

from __future__ import annotations

import os
import statistics
import sys
import time

os.environ.setdefault("KINETO_LOG_LEVEL", "99")


def main(model: str = "vit_glyphs_patch4_32", micro: int = 32, rounds: int = 30) -> None:
    import torch

    from tune_study import train
    from tune_study.config import parse_trial
    from tune_study.data import load
    from tune_study.gradients import NoiseScale
    from tune_study.model import build_model
    from tune_study.resources import ResourceMonitor

    def started(mode: str, accumulation: int) -> train.Training:
        config = parse_trial(
            {
                "model": model,
                "dataset": "digits",
                "quantization": mode,
                "pretrained": model.startswith("vit_glyphs"),
                "training": {
                    "per_device_train_batch_size": micro,
                    "gradient_accumulation_steps": accumulation,
                },
            }
        )
        device = torch.device("cpu")
        data = load("digits", None, config.data)
        training = train.start(config, build_model(config, 10), data, device)
        training.model.train()
        return training

    def timed(training: train.Training) -> float:
        size = train.images_per_step(training.config)
        images, labels = (tensor[:size] for tensor in training.data.train)
        begun = time.perf_counter()
        train.train_step(training, images, labels)
        return time.perf_counter() - begun

    for mode in ("none", "nf4"):
        for name, accumulation in (("gradient monitor", 1), ("noise scale", 2)):
            training = started(mode, accumulation)
            parameters = list(training.parameters.values())
            observe, noise = training.monitor.observe, NoiseScale(training.parameters)

            def plain(loss: torch.Tensor, parameters=parameters) -> torch.Tensor:
                return torch.nn.utils.get_total_norm([p.grad for p in parameters])

            times: dict[bool, list[float]] = {True: [], False: []}
            for step in range(2 * rounds + 4):
                on = step % 2 == 0
                if name == "gradient monitor":
                    training.monitor.observe = observe if on else plain  # type: ignore[method-assign]
                else:
                    training.noise = noise if on else None
                elapsed = timed(training)
                if step >= 4:
                    times[on].append(elapsed)
            say(name, mode, times)
    training = started("none", 1)
    times = {True: [], False: []}
    for step in range(2 * rounds + 4):
        if on := step % 2 == 0:
            with ResourceMonitor(torch.device("cpu"), interval_s=0.05):  # 20 times as often
                elapsed = timed(training)
        else:
            elapsed = timed(training)
        if step >= 4:
            times[on].append(elapsed)
    say("resource monitor, 20 samples a second", "none", times)


def say(name: str, mode: str, times: dict[bool, list[float]]) -> None:
    on, off = (statistics.median(times[key]) for key in (True, False))
    print(
        f"{name}, {mode}: {1e3 * off:.1f} ms without, {1e3 * on:.1f} ms with, "
        f"ratio {on / off:.4f} ({len(times[True])} steps each)",
        flush=True,
    )


if __name__ == "__main__":
    arguments = sys.argv[1:]
    main(*arguments[:1], *map(int, arguments[1:]))
