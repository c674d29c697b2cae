"""Plant faults in the kernels and see that the tests catch every one: ``just mutants``.

Each fault is a replacement in a copy of the package; a fault that no test notices is printed and
makes the exit code 1.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FAULTS = {
    "lora/torch_backend.py": [
        ("torch.mm((x[t] @ A[r].mT).mul_(scale), B[r], out=y[t])",
         "torch.mm(x[t] @ A[r].mT, B[r], out=y[t])", "scale dropped when ragged"),
        ("torch.bmm(torch.bmm(x, A.mT).mul_(scale), B)",
         "torch.bmm(torch.bmm(x, A.mT), B)", "scale dropped when equal"),
        ("slice(r - k, r))", "slice(r - k, max(r - k, r - 1)))", "last rank row skipped"),
        ("(slice(t - n, t), slice", "(slice(t - n, max(t - n, t - 1)), slice",
         "token skipped"),
        ("torch.mm(d_down.mT, x[t], out=dA[r])", "torch.mm(down.mT, x[t], out=dA[r])",
         "wrong factor in dA"),
        ("(dy[t] @ B[r].mT).mul_(scale)", "(dy[t] @ B[r].mT)", "scale dropped in the gradient"),
        ("torch.bmm(d_down, A), torch", "torch.bmm(d_down, A).flip(0), torch",
         "wrong segment in dx"),
    ],
    "cross/torch_backend.py": [
        (".mul_(scale)\n\n\ndef _heads", "\n\n\ndef _heads", "scale dropped from the scores"),
        ("torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)", "(dp * p)",
         "row sum missing from dS"),
        ("p.dtype).mul_(scale)", "p.dtype)", "scale dropped in the gradient"),
        ("start = ends[first] - n", "start = max(0, ends[first] - n - 1)",
         "off by one in offsets"),
        ("lengths[last] == n and", "lengths[last] >= n and", "unequal segments in one block"),
        ("p.div_(total)", "p.div_(total + 1e-3)", "softmax not normalised"),
        ("scores.to(torch.promote_types(q.dtype, torch.float32))", "scores",
         "softmax in low precision"),
        ("out[seg], lse[seg] = 0, -torch.inf", "lse[seg] = -torch.inf",
         "empty segment not cleared"),
    ],
    "latent/torch_backend.py": [
        ("dk.add_(dv)", "dk", "gradient through the values lost"),
        ("(dn - n * mean)", "dn", "norm's projection lost"),
        ("(rho * (dn", "((dn", "rho lost in the gradient"),
        ("F.rms_norm(x, (x.shape[1],), eps=eps)", "F.rms_norm(x, (x.shape[1],), eps=0.1)",
         "wrong eps"),
        ("attention.backward(d_out, q, n, n, out, lse, lengths, scale)",
         "attention.backward(d_out, q, n, n, out, lse, lengths, 1.0)",
         "scale lost in the gradient"),
    ],
    "latent/__init__.py": [
        ("(W_k * norm_weight)", "W_k", "norm weight lost from the keys"),
        ("(W_v * norm_weight)", "W_v", "norm weight lost from the values"),
        ("1 / math.sqrt(d_head)", "1 / math.sqrt(x.shape[1])", "scale of the wrong width"),
    ],
    "distill/torch_backend.py": [
        ("z = z.div_(softcap).tanh_()", "z = z.div_(softcap)", "softcap missing"),
        ("dz.mul_(slope)", "pass", "slope of the softcap missing"),
        ("mass * (top + total.log())", "(top + total.log())", "teacher's mass taken as 1"),
        ("(mass / total)[:, None]", "(1 / total)[:, None]", "mass missing in the gradient"),
        ("(top + total.log())", "(total.log())", "maximum not added back"),
        ("min(n, start + per_block)", "min(n - 1, start + per_block)", "last row skipped"),
        ("scatter_add_(1, idx, -p)", "scatter_add_(1, idx, p)", "sign of the target"),
    ],
    "distill/__init__.py": [("loss * weight", "loss", "weights ignored")],
    "dispatch.py": [("enabled=False", "enabled=True", "autocast inside an op")],
}  # fmt: skip


def caught(file: str, old: str, new: str) -> bool:
    """Plant one fault and run the kernels' tests against it."""
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "d2l_kernels"
        shutil.copytree(ROOT / "kernels/d2l_kernels", package)
        source = (package / file).read_text()
        if source.count(old) < 1:
            raise SystemExit(f"{file} no longer holds {old!r}: renew the fault")
        (package / file).write_text(source.replace(old, new))
        tests = [str(p) for p in sorted((ROOT / "tests/kernels").glob("test_*.py"))]
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
        command += ["--deselect", "tests/kernels/test_backends.py::test_traces_whole_under_compile"]
        env = os.environ | {"PYTHONPATH": folder, "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        if done.returncode not in (0, 1):
            raise SystemExit(f"the tests did not run against {file}: {done.stdout[-2000:]}")
        return done.returncode == 1


def main() -> None:
    """Try every fault and report; an unchanged copy must pass."""
    if caught("dispatch.py", "", ""):
        sys.exit("the tests fail without a fault")
    missed = []
    for file, faults in FAULTS.items():
        for old, new, what in faults:
            seen = caught(file, old, new)
            print(f"{'caught' if seen else 'MISSED'}  {file}: {what}", flush=True)
            missed += [] if seen else [what]
    sys.exit(f"{len(missed)} faults were not noticed" if missed else 0)


if __name__ == "__main__":
    main()
