"""Functions of a number: of a float, and of each number of a tensor."""

import math

import pytest
import torch

from rlsched import number

NUMBERS = [-math.inf, -3e38, -1.0, -1e-30, 0.0, 1e-30, 0.5, 1.0, 80.0, 3e38, math.inf, math.nan]
FUNCTIONS = {
    "log": number.log,
    "exp": lambda x: number.exp(number.clamp(x, high=80.0)),
    "sqrt": number.sqrt,
    "isnan": number.isnan,
    "clamp": lambda x: number.clamp(x, -2.0, 0.75),
    "clamp from below": lambda x: number.clamp(x, low=0.25),
    "clamp from above": lambda x: number.clamp(x, high=0.25),
    "clamp between numbers": lambda x: number.clamp(x, 0 * number.exp(x) - 1.0, 0 * number.exp(x) + 1.0),
    "where": lambda x: number.where(x > 0, x, 2.0),
    "where of constants": lambda x: number.where(x > 0, 1.0, 2.0),
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_float_is_treated_as_a_number_of_a_tensor(function):
    """A user's run, in floats, would follow another law than the batches that its policy was trained on."""
    numbers = [x for x in NUMBERS if abs(x) < 80] if function is FUNCTIONS["clamp between numbers"] else NUMBERS
    together = function(torch.tensor(numbers)).tolist()
    assert together == pytest.approx([function(x) for x in numbers], rel=1e-6, nan_ok=True)


@pytest.mark.parametrize("x", [0.0, -1.0, math.inf, -math.inf, math.nan])
def test_logarithm_that_does_not_exist_is_not_known(x):
    """A loss of zero would be an infinitely good one, and drown all that comes after."""
    assert math.isnan(number.log(x)) and number.log(torch.tensor(x)).isnan()


def test_unknown_stays_unknown_between_bounds():
    """What was not measured would be taken for a measurement at its bound."""
    for x in (math.nan, torch.tensor(math.nan)):
        assert number.isnan(number.clamp(x, -1.0, 1.0))


SERIES = [
    [1.0, 2.0, 4.5],
    [math.nan, 2.0, -4.5],
    [math.nan, math.nan],
    [3.0],
    [0.0, 0.0],
    [math.inf, 1.0],
    [math.inf, -math.inf],
    [1e30, math.nan, 1e-30, -1e30],
]


@pytest.mark.parametrize("series", SERIES)
def test_series_of_floats_is_a_row_of_a_tensor(series):
    """What a window comes to would depend on whether one run was measured, or many."""
    rows = torch.tensor([series, series[::-1]], dtype=torch.float64)
    for values, row in ((tuple(series), 0), (tuple(series[::-1]), 1)):
        mean = number.mean(values)
        assert number.mean(rows)[row].item() == pytest.approx(mean, nan_ok=True)
        spread = number.deviation(rows, number.mean(rows))[row].item()
        assert spread == pytest.approx(number.deviation(values, mean), nan_ok=True)
        doubled = number.each(lambda x, y: x + y, rows, rows)[row].tolist()
        assert doubled == pytest.approx(list(number.each(lambda x, y: x + y, values, values)), nan_ok=True)


def test_mean_and_deviation_are_of_what_is_known():
    """One NaN in a thousand steps would blind the policy."""
    values = (1.0, math.nan, 3.0, 5.0)
    assert number.mean(values) == 3
    assert number.deviation(values, 3.0) == pytest.approx(math.sqrt((4 + 0 + 4) / 3))
    assert math.isnan(number.mean((math.nan,))) and math.isnan(number.deviation((math.nan,), math.nan))
