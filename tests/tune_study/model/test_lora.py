"""Our forward pass of a LoRA layer against PEFT's, and its dropout against dropout's definition."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft.tuners.lora import LoraLayer
from scipy import stats
from torch import Tensor, nn

from tune_study.config import TrialConfig
from tune_study.model import lora
from tune_study.model.build import build_model, trainable
from tune_study.model.lora import _AddAdapter, draw_mask, drop, kept_share

CPU = torch.device("cpu")
ONES = torch.ones(250_001)
MODES = ["none", "int8", "nf4", "nf4-dq"]


class SameMasks(nn.Module):
    """Dropout by its definition, with the masks of ``draw_mask``, for PEFT's own forward pass."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return x * draw_mask(x, self.p) / kept_share(self.p, x.device)


def built(config: TrialConfig, pefts: bool) -> nn.Module:
    model = build_model(config, 10).model.train()
    torch.manual_seed(5)
    for layer in (m for m in model.modules() if isinstance(m, LoraLayer)):
        nn.init.normal_(layer.lora_B["default"].weight, std=0.02)  # 0 before the first step
        if pefts:
            del layer.forward
            if config.lora.lora_dropout:
                layer.lora_dropout["default"] = SameMasks(config.lora.lora_dropout)
    return model


def outputs_and_gradients(model: nn.Module, bf16: bool) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(1)
    images = torch.randn(4, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        scores = model(images)
    nn.functional.cross_entropy(scores.float(), torch.arange(4)).backward()
    return scores.detach().float(), {n: p.grad for n, p in trainable(model).items()}


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("mode", MODES)
def test_it_is_pefts_to_rounding(mode: str, p: float, tiny: Callable[..., TrialConfig]) -> None:
    """In fp32 to 1e-5, outputs and every gradient."""
    config = tiny(mode, lora={"lora_dropout": p}, training={"compute_dtype": "fp32"})
    ours, ours_grad = outputs_and_gradients(built(config, pefts=False), bf16=False)
    theirs, theirs_grad = outputs_and_gradients(built(config, pefts=True), bf16=False)
    assert relative(ours, theirs) < 1e-5
    assert ours_grad.keys() == theirs_grad.keys()
    assert all(relative(ours_grad[name], grad) < 1e-5 for name, grad in theirs_grad.items())


@pytest.mark.parametrize("mode", MODES)
def test_in_bf16_it_is_as_near_to_fp32_as_pefts(
    mode: str, tiny: Callable[..., TrialConfig]
) -> None:
    config = tiny(mode, lora={"lora_dropout": 0.0}, training={"compute_dtype": "bf16"})
    exactly = tiny(mode, lora={"lora_dropout": 0.0}, training={"compute_dtype": "fp32"})
    exact, exact_grad = outputs_and_gradients(built(exactly, pefts=True), bf16=False)
    errors = []
    for pefts in (False, True):
        scores, grads = outputs_and_gradients(built(config, pefts), bf16=True)
        worst = max(relative(grads[name], grad) for name, grad in exact_grad.items())
        errors.append((relative(scores, exact), worst))
    (ours, ours_worst), (theirs, theirs_worst) = errors
    assert ours < 1.5 * theirs + 0.002
    assert ours_worst < 1.5 * theirs_worst + 0.01


@pytest.mark.parametrize("devices", [set(), {"cpu"}])
def test_the_gradients_are_those_of_finite_differences(
    devices: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lora, "ONE_KERNEL", devices)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    def seeded(base: Tensor, *tensors: Tensor) -> Tensor:
        torch.manual_seed(3)  # the same masks at every call
        return _AddAdapter.apply(base.clone(), *tensors, 0.7, 0.4)  # it is written into

    assert torch.autograd.gradcheck(
        seeded, (drawn(2, 5, 6), drawn(2, 5, 4), drawn(3, 4), drawn(6, 3))
    )


def test_without_the_adapter_it_is_the_base_model(tiny: Callable[..., TrialConfig]) -> None:
    model = built(tiny("nf4"), pefts=False).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode(), model.disable_adapter():
        off = model(images)
    for layer in (m for m in model.modules() if isinstance(m, LoraLayer)):
        nn.init.zeros_(layer.lora_B["default"].weight)
    with torch.inference_mode():
        assert not torch.equal(off, built(tiny("nf4"), pefts=False).eval()(images))
        # The trained copy of the head is part of the adapter.
        features = [model.base_model.model.forward_features(images)]
        with model.disable_adapter():
            features.append(model.base_model.model.forward_features(images))
    assert torch.equal(*features)


def test_torchs_own_dropout_gives_what_the_definition_gives(
    tiny: Callable[..., TrialConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where one kernel draws, drops and divides: here the CPU's stands in for CUDA's."""
    monkeypatch.setattr(lora, "ONE_KERNEL", {"cpu"})
    config = tiny("none", lora={"lora_dropout": 0.3}, training={"compute_dtype": "fp32"})
    ours, theirs = built(config, pefts=False), built(config, pefts=True)
    for layer in (m for m in theirs.modules() if isinstance(m, LoraLayer)):
        layer.lora_dropout["default"] = nn.Dropout(0.3)
    scores, gradients = outputs_and_gradients(ours, bf16=False)
    others, their_gradients = outputs_and_gradients(theirs, bf16=False)
    assert relative(scores, others) < 1e-5
    assert all(relative(gradients[name], g) < 1e-5 for name, g in their_gradients.items())


@pytest.mark.parametrize("bf16", [False, True])
def test_all_adapters_at_once_give_the_bits_of_each_for_itself(
    bf16: bool, tiny: Callable[..., TrialConfig]
) -> None:
    spec = {"lora_dropout": 0.3, "rank_pattern": {"qkv": 2}, "alpha_pattern": {"proj": 3}}
    training = {"compute_dtype": "bf16" if bf16 else "fp32"}
    model = built(tiny("none", lora=spec, training=training), pefts=False)
    layers = [m for m in model.modules() if isinstance(m, LoraLayer)]
    seen = []
    layers[5].base_layer.register_forward_hook(
        lambda *_: seen.append(vars(layers[5]).get("prepared"))
    )
    together = outputs_and_gradients(model, bf16)
    assert not any("prepared" in vars(layer) for layer in layers)  # they learn before the next pass
    for parameter in model.parameters():
        parameter.grad = None
    model._forward_pre_hooks.clear()
    alone = outputs_and_gradients(model, bf16)
    assert [found is None for found in seen] == [False, True]
    assert seen[0][0].dtype == (torch.bfloat16 if bf16 else torch.float32)
    assert torch.equal(together[0], alone[0])
    assert all(torch.equal(gradient, alone[1][name]) for name, gradient in together[1].items())


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9, 0.995])
def test_each_element_is_kept_with_probability_1_minus_p(p: float) -> None:
    torch.manual_seed(0)
    for ones in (ONES, ONES[:250_000].view(-1, 50)):  # each a number of its own, and rows share it
        mask, share = draw_mask(ones, p), kept_share(p, CPU)
        assert stats.binomtest(int(mask.sum()), mask.numel(), 1 - p).pvalue > 0.001
        assert share == pytest.approx(1 - p, abs=1e-9)


def test_a_feature_is_dropped_with_probability_p_over_many_calls() -> None:
    """Within a call its rows share a bound, which is off by at most one 256th."""
    torch.manual_seed(0)
    kept = sum(int(draw_mask(ONES[:1000].view(1000, 1), 0.1).sum()) for _ in range(400))
    assert stats.binomtest(kept, 400_000, 0.9).pvalue > 0.001


def test_more_than_a_256th_is_always_kept_and_the_share_says_so() -> None:
    torch.manual_seed(0)
    mask, share = draw_mask(ONES, 0.9999), kept_share(0.9999, CPU)
    assert share == 1 / 256
    assert stats.binomtest(int(mask.sum()), len(ONES), share).pvalue > 0.001


def test_masks_are_independent_of_their_neighbours_and_of_the_next_call() -> None:
    torch.manual_seed(0)
    first, second = (draw_mask(ONES, 0.3) for _ in range(2))
    # The eight elements of one 64-bit draw, and the same element of two calls.
    pairs = [(first[:-lag], first[lag:]) for lag in range(1, 9)] + [(first, second)]
    for a, b in pairs:
        table = [[int((a.eq(i) & b.eq(j)).sum()) for j in (0, 1)] for i in (0, 1)]
        assert stats.chi2_contingency(table).pvalue > 0.001


def test_the_seed_decides_the_masks() -> None:
    masks = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        masks.append(draw_mask(ONES, 0.4))
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


def test_nothing_is_dropped_in_evaluation(tiny: Callable[..., TrialConfig]) -> None:
    config = tiny("none", lora={"lora_dropout": 0.5}, training={"compute_dtype": "fp32"})
    model = built(config, pefts=False).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(model(images), model(images))
        assert not torch.equal(model.train()(images), model(images))


def test_the_masks_are_the_bytes_of_the_draws_that_reach_a_features_bound() -> None:
    x = torch.ones(37, 13)
    torch.manual_seed(7)
    mask = draw_mask(x, 0.1)
    torch.manual_seed(7)
    bounds = [26 if draw < 0.6 else 25 for draw in torch.rand(13).tolist()]  # 256 p = 25.6
    assert set(bounds) == {25, 26}
    draws = torch.empty((37 * 13 + 7) // 8, dtype=torch.int64).random_(-(2**63), None)
    flat = draws.numpy().tobytes()
    expected = [[flat[13 * row + f] >= bounds[f] for f in range(13)] for row in range(37)]
    assert mask.tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropped_elements_are_zero_and_the_others_as_they_were(dtype: torch.dtype) -> None:
    x, mask = torch.randn(7, 5, dtype=dtype), torch.rand(7, 5) < 0.5
    assert torch.equal(drop(x, mask), torch.where(mask, x, 0))


def test_the_sum_takes_the_memory_of_the_base_layers_output() -> None:
    base, x, a, b = torch.ones(2, 3, 6), torch.randn(2, 3, 4), torch.randn(2, 4), torch.randn(6, 2)
    out = _AddAdapter.apply(base, x, a, b, 0.5, 0.0)
    assert out.data_ptr() == base.data_ptr()
    assert torch.allclose(out, 1 + 0.5 * (x @ a.T @ b.T))


@pytest.mark.parametrize(("p", "kept"), [(0.1, 58982), (0.3, 45875), (0.999999, 1)])
def test_elsewhere_the_share_is_a_whole_number_of_65536ths(p: float, kept: int) -> None:
    mask = draw_mask(torch.empty(2, 3, device="meta"), p)
    assert kept_share(p, mask.device) == kept / 2**16
    assert (mask.shape, mask.dtype) == ((2, 3), torch.bool)


def test_what_an_adapter_adds_and_learns_in_closed_form() -> None:
    """base + 0.5 B A x, with unequal sizes."""
    x, a, b = torch.randn(4, 3), torch.randn(2, 3), torch.randn(5, 2)
    tensors = [tensor.clone().requires_grad_() for tensor in (x, a, b)]
    base = torch.randn(4, 5)
    out = _AddAdapter.apply(base.clone(), *tensors, 0.5, 0.0)
    torch.testing.assert_close(out, base + 0.5 * x @ a.T @ b.T)
    weights = torch.randn(4, 5)
    (out * weights).sum().backward()
    into_x, of_a, of_b = (tensor.grad for tensor in tensors)
    torch.testing.assert_close(into_x, 0.5 * weights @ b @ a)
    torch.testing.assert_close(of_a, 0.5 * (weights @ b).T @ x)
    torch.testing.assert_close(of_b, 0.5 * weights.T @ (x @ a.T))
