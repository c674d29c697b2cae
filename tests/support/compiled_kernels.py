"""Run every op under torch.compile(fullgraph=True), both ways, and compare with eager."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from kernel_cases import OPS, case, run

if __name__ == "__main__":
    for op in OPS:
        one = case(op, (5, 1, 7))
        expected = run(one)
        one.fn = torch.compile(one.fn, fullgraph=True, backend="aot_eager")
        for a, b in zip(run(one), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        print(op.replace(", ", "-"))
