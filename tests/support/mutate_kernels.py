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
    "cross/triton_backend.py": [
        ("tl.trans(k_tile), ACC) * scale", "tl.trans(k_tile), ACC)",
         "scale dropped from the scores"),
        ("total = total * shrink +", "total = total +", "sum not rescaled to a new maximum"),
        ("acc = acc * shrink[:, None] + _dot", "acc = acc + _dot",
         "values not rescaled to a new maximum"),
        ("scores = tl.where((first + tl.arange(0, N) < n)[None, :], scores, float(\"-inf\"))",
         "scores += 0", "tokens beyond the end counted"),
        ("n = tl.minimum(size, tl.load(tok_start + seg + 1) - start)", "n = size",
         "piece longer than its segment"),
        ("tile * weight[:, None]", "tile", "pieces added up without their weights"),
        ("tl.load(of_segment + seg + 1)):", "tl.load(of_segment + seg + 1) - 1):",
         "last piece of a segment skipped"),
        ("k += (start * HEADS + head) * D", "k += start * HEADS * D", "wrong KV head"),
        ("_probabilities(scores, lse_tile) * (dp - dot_tile)",
         "_probabilities(scores, lse_tile) * dp", "row sum missing from dS of dq"),
        ("ds = p * (dp - dot_tile)", "ds = p * dp", "row sum missing from dS of dk"),
        ("for block in range(0, rows, M)", "for block in range(0, rows - M + 1, M)",
         "last block of rows skipped"),
        ("tl.load(tok_start + seg) > 1).to(ACC)", "tl.load(tok_start + seg) > 0).to(ACC)",
         "rounding of a lone token's score kept"),
        ("\"ACC\": ts.accumulator(q.dtype)", "\"ACC\": tl.float16", "float16 accumulation"),
        ("scores * (1 / rms) - tl.log(rms)", "scores * (1 / rms)", "rho lost from the weights"),
        ("tl.sum(p * rms if NORM else p, 1)", "tl.sum(p, 1)", "sum over weights, not shares"),
        ("(dp * rho - dot_tile) * rho", "(dp * rho - dot_tile)", "rho lost from dq"),
        ("along += tl.sum(ds * scores + p * dp, 0)", "along += tl.sum(ds * scores, 0)",
         "values lost from the norm's projection"),
        ("/ D + eps)", "/ D)", "eps lost"),
    ],
    "cross/flash_backend.py": [
        ("softmax_scale=scale,", "", "scale dropped"),
        ("deterministic=True", "deterministic=False", "gradient in any order"),
        ("max_seqlen_k=max(filled)", "max_seqlen_k=min(filled)", "longest segment cut"),
        ("dq[i], dk[start] = 0, 0", "pass", "rounding of a lone token's score kept"),
        ("out = torch.zeros_like(q)", "out = torch.full_like(q, torch.nan)",
         "empty segment not cleared"),
        ("[0, *accumulate(lengths)]", "[0, *lengths]", "lengths taken for offsets"),
    ],
    "latent/triton_backend.py": [
        ("lengths, scale, eps)\n    return out", "lengths, 1.0, eps)\n    return out",
         "scale lost"),
        ("lengths, scale, eps)\n    return dq", "lengths, 1.0, eps)\n    return dq",
         "scale lost in the gradient"),
        ("lengths, scale, eps)\n    return dq", "lengths, scale, 0.1)\n    return dq",
         "wrong eps in the gradient"),
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
