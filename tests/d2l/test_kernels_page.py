"""What the page on the kernels computes: floors by hand, the newest timings, errors by dtype."""

import pandas as pd
import pytest

from d2l.experiments import kernels


def test_floors_are_those_worked_out_by_hand():
    found = kernels.floors().set_index("work")["floor_us"]
    x_and_y = 2 * 4096 * (9216 + 2304) / 3.0e12
    context = 26 * 4096 * 512 * 2 / 3.0e12
    products = 4 * 1024 * 2304 * 256000 / 790e12
    assert list(found) == pytest.approx([1e6 * x_and_y, 1e6 * context, 1e6 * products])
    assert list(found.round(0)) == [31, 36, 3058]


def test_speed_is_the_newest_row_of_each_form(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "repo_root", lambda: tmp_path)
    with pytest.raises(FileNotFoundError, match="just bench kernels"):
        kernels.speed()
    (tmp_path / "kernels/bench").mkdir(parents=True)
    row = {"op": "a", "size": "s", "direction": "forward", "form": "ours"}
    rows = [row | {"p50_ms": 3.0}, row | {"form": "naive", "p50_ms": 9.0}, row | {"p50_ms": 2.0}]
    pd.DataFrame(rows).to_csv(tmp_path / "kernels/bench/results.csv", index=False)
    assert dict(kernels.speed()[["form", "p50_ms"]].values) == {"naive": 9.0, "ours": 2.0}


def test_errors_grow_with_the_rounding_of_the_dtype():
    found = kernels.errors().pivot(index=["op", "form"], columns="dtype", values="error")
    assert len(found) == 8
    assert (found["float32"] < 1e-5).all()
    assert (found["float32"] < found["float16"]).all()
    assert (found["float16"] < found["bfloat16"]).all()
