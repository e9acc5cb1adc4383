"""The static product of int8 layers is bitsandbytes' own to the last bit."""

import logging

import pytest
import torch
from bitsandbytes.autograd._functions import MatMul8bitLt

from tune_study.errors import UserError
from tune_study.model import outliers, quantize
from tune_study.model.outliers import Product, make_static

IN, OUT, MANY = 192, 96, 100
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # as environment.prepare


def layer_of(bias=True, in_features=IN):
    torch.manual_seed(0)
    plain = torch.nn.Linear(in_features, OUT, bias=bias)
    return quantize.quantize_linear(plain, "int8", torch.bfloat16, "cpu")


def rows_of(count, columns, dtype=torch.bfloat16, in_features=IN):
    """[count, in] with outliers in ``columns`` columns: one of exactly the threshold, the others
    far beyond it, in any row."""
    rows = torch.randn(count, in_features).clamp(-5, 5)
    places = torch.randperm(in_features)[:columns]
    sizes = torch.randn(columns).sign() * (6 + 30 * torch.rand(columns))
    sizes[:1] = quantize.INT8_THRESHOLD
    rows[torch.randint(count, (columns,)), places] = sizes
    return rows.to(dtype)


def theirs(layer, x):
    """(product, its gradient for a fixed gradient of the output), by bitsandbytes."""
    layer.state.CB, layer.state.SCB = quantize.int8_state(layer)
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return differentiated(lambda x: MatMul8bitLt.apply(x, layer.weight, None, bias, layer.state), x)


def ours(layer, x, room):
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    codes, scales = quantize.int8_state(layer)
    return differentiated(lambda x: Product.apply(x, codes, scales, bias, room, None), x)


def differentiated(product, x):
    leaf = x.clone().requires_grad_()
    out = product(leaf)
    gradient = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return out.detach(), torch.autograd.grad(out, leaf, gradient)[0]


def assert_equal(mine, other):
    for one, their in zip(mine, other, strict=True):
        assert one.dtype == their.dtype
        assert torch.equal(one, their)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("columns", [0, 1, 3, MANY, IN])
@pytest.mark.parametrize(
    ("dtype", "rows"),
    [(torch.bfloat16, 1), (torch.bfloat16, 2), (torch.bfloat16, 300), (torch.float32, 300)],
)
def test_the_product_is_bitsandbytes_own(dtype, rows, columns, bias):
    layer = layer_of(bias)
    x = rows_of(rows, columns, dtype)
    for room in (IN, max(columns, 32)):
        assert_equal(ours(layer, x, room), theirs(layer, x))


@pytest.mark.parametrize("columns", [0, 1, 3, MANY])
@pytest.mark.parametrize(("dtype", "rows"), [(torch.float16, 300), (torch.float32, 1)])
def test_where_a_kernel_sums_by_the_length_it_is_so_without_zeros(dtype, rows, columns):
    """The CPU's products of fp16, and in fp32 of up to three rows, group their terms by length."""
    layer, x = layer_of(), rows_of(rows, columns, dtype)
    other = theirs(layer, x)
    assert_equal(ours(layer, x, columns), other)
    torch.testing.assert_close(ours(layer, x, IN), other, rtol=2**-9, atol=2**-9)


def test_images_are_rows_and_the_bias_is_cast_as_bitsandbytes_casts_it():
    static, own = torch.nn.Sequential(layer_of()), torch.nn.Sequential(layer_of())
    make_static(static)
    x = rows_of(40, 3, torch.float32).view(4, 10, IN)
    with torch.autocast("cpu", torch.bfloat16):
        other = differentiated(own.eval(), x)  # on the CPU bitsandbytes' other kernel trains
        for training in (False, True):
            mine = differentiated(static.train(training), x)
            assert_equal(mine, other)
    assert mine[0].shape == (4, 10, OUT)
    assert mine[0].dtype == static[0].bias.dtype == torch.bfloat16


def test_a_bias_that_learns_keeps_its_type_and_gets_a_gradient():
    model = torch.nn.Sequential(layer_of())
    make_static(model)
    model[0].bias.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        model(rows_of(7, 3)).sum().backward()
    assert model[0].bias.dtype == torch.float32
    assert torch.equal(model[0].bias.grad, torch.full((OUT,), 7.0))


def test_more_outliers_than_room_are_counted_and_refused(monkeypatch):
    monkeypatch.setattr(outliers, "ROOM", 5)
    wide = torch.nn.Module()
    wide.fc1, wide.fc2 = layer_of(), layer_of(in_features=64)
    found = make_static(wide)
    with torch.inference_mode():
        wide.fc1(rows_of(40, 5)), wide.fc2(rows_of(40, 2, in_features=64))
    assert found.met.tolist() == [5, 2]
    found.refuse_more_than_room()
    wide.fc2(rows_of(40, 6, in_features=64)), wide.fc2(rows_of(40, 1, in_features=64))
    assert found.met.tolist() == [5, 6]
    words = (
        "^training.step = graph: fc2 has met 6 outlier columns at once, and a graph has room for "
        "5; set training.step=eager$"
    )
    with pytest.raises(UserError, match=words):
        found.refuse_more_than_room()


def test_a_layer_with_room_for_all_its_columns_counts_none():
    model = torch.nn.Sequential(layer_of(), layer_of(in_features=outliers.ROOM + 64))
    found = make_static(model)
    assert found.names == ["1"]
    model[0](rows_of(40, IN))
    found.refuse_more_than_room()
    assert found.met.tolist() == [0]
