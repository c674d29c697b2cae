"""Peak memory against what the tensors of a known piece of work must take."""

import math
import time

import pytest
import torch

from d2l.meter import MIB, LiveTensors, Meter, measured

CPU = torch.device("cpu")


def peak_mib(work):
    _, meter = measured(work, CPU, count_memory=True)
    assert math.isnan(meter.seconds)
    return meter.peak_mib


def test_tensors_that_die_are_not_counted_twice():
    def work():
        x = torch.zeros(256, 1024)
        for _ in range(5):
            x = x + 1
        return x.sum()

    assert peak_mib(work) == pytest.approx(2.0, abs=0.01)


def test_views_and_tensors_from_before_are_free():
    before = torch.zeros(256, 1024)

    def work():
        kept = [before[i:].T for i in range(10)]
        before.add_(1)
        return len(kept)

    assert peak_mib(work) == 0.0


def test_what_autograd_saves_is_counted():
    weight = torch.zeros(256, 256, requires_grad=True)

    def work():
        x = torch.ones(1024, 256)
        for _ in range(8):
            x = torch.sigmoid(x @ weight)
        x.sum().backward()

    saved = 1024 * 256 * 4 / MIB * 9
    assert saved < peak_mib(work) < saved + 4


def test_the_count_returns_to_zero_and_nests():
    with LiveTensors() as outer:
        torch.ones(1000)
        with LiveTensors() as inner:
            kept = torch.ones(1000)
        assert inner.now == 4000
    assert outer.now == 4000
    del kept
    assert inner.now == outer.now == 0


def test_seconds_are_measured_without_counting():
    result, meter = measured(lambda: time.sleep(0.02) or 7, CPU)
    assert result == 7
    assert meter.seconds >= 0.02
    assert math.isnan(meter.peak_mib)


def test_meters_add_up():
    assert Meter(1.0, 5.0) + Meter(2.0, 3.0) == Meter(3.0, 5.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_measures_both():
    device = torch.device("cuda")
    _, meter = measured(lambda: torch.zeros(256, 1024, device=device), device)
    assert meter.seconds > 0
    assert meter.peak_mib == pytest.approx(1.0)
