"""Plant faults in the kernels and see that the tests catch every one, after ``just test-kernels``.

Each fault is a replacement in a copy of the package; a fault that no test notices is printed and
makes the exit code 1.  Faults in Triton kernels are for the interpreter's tests.  Name files or ops
to try theirs alone: ``mutate_kernels.py lora/triton``.
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
        ("alpha=scale", "alpha=1", "scale dropped from the scores"),
        ("torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)", "(dp * p)",
         "row sum missing from dS"),
        ("p.dtype).mul_(scale)", "p.dtype)", "scale dropped in the gradient"),
        ("start = ends[first] - n", "start = max(0, ends[first] - n - 1)",
         "off by one in offsets"),
        ("lengths[last] == n and", "lengths[last] >= n and", "unequal segments in one block"),
        ("bmm(p.to(v.dtype), v_i", "bmm((1.001 * p).to(v.dtype), v_i", "softmax not normalised"),
        ("s.to(torch.promote_types(q.dtype, torch.float32))", "s.float()",
         "float64 scores in float32"),
        ("out = torch.zeros_like(q)", "out = torch.full_like(q, 7)", "empty segment not cleared"),
    ],
    "latent/torch_backend.py": [
        ("torch.cat((ds, p.to(q.dtype)), 1)", "torch.cat((ds, 0 * p.to(q.dtype)), 1)",
         "gradient through the values lost"),
        ("torch.addcmul(dn, exact, mean, value=-1)", "dn", "norm's projection lost"),
        (".mul_(rho)", "", "rho lost in the gradient"),
        (".mean(-1, keepdim=True) + eps)", ".mean(-1, keepdim=True) + 0.1)", "wrong eps"),
        ("p.dtype).mul_(scale)", "p.dtype)", "scale lost in the gradient"),
        ("out = torch.zeros_like(q)", "out = torch.full_like(q, 7)", "empty segment not cleared"),
    ],
    "lora/triton_backend.py": [
        ("(total * scale)", "(total)", "scale dropped"),
        ("range(start, tl.minimum(start + per_split, width), BLOCK_D)",
         "range(start, tl.minimum(start + per_split, width) - BLOCK_D, BLOCK_D)", "skipped tail"),
        ("t_ok, r_ok = t < tl.load(tok_start + segment + 1), r < rank_1 - rank_0",
         "t_ok, r_ok = t < n_tok, r < rank_1 - rank_0", "tokens of the next segment as well"),
        ("r_ok, d_ok = row < rank_1, d < width", "r_ok, d_ok = row < rank_1 + 1, d < width",
         "off by one in ragged ranks"),
        ("range(tl.load(tok_start + segment), stop, BLOCK_T)",
         "range(tl.load(tok_start + segment) + 1, stop, BLOCK_T)", "first token skipped in dA, dB"),
        ("factor + (rank_0 + r).to(tl.int64)[:, None] * width",
         "factor + r.to(tl.int64)[:, None] * width", "wrong segment's factor"),
        ("row = tl.program_id(2) * n_tok + t", "row = t", "splits on top of each other"),
    ],
    "distill/triton_backend.py": [
        ("z = softcap * tl.where(s < 0.01, near, far)", "z = z + 0 * near", "softcap missing"),
        ("slope = 4 * e / ((1 + e) * (1 + e))", "slope = slope + 0 * e", "slope missing"),
        ("z = tl.where(at < vocab, z, float(\"-inf\"))", "z = z + 0",
         "columns past the vocabulary"),
        ("total = total * tl.exp(top - new) +", "total = total +", "sum not rescaled"),
        ("loss + row, mass * (top", "loss + row, (top", "teacher's mass taken as 1"),
        ("tl.store(z_row + at_j, dz.to(logits.dtype.element_ty), j < k)", "pass",
         "targets missing from the gradient"),
        ("wanted += tl.where(same,", "wanted = tl.where(same,", "only the last target counts"),
        ("start + here.to(tl.int64)", "here.to(tl.int64)", "argmax within its block"),
    ],
    "cross/triton_backend.py": [
        ("scores = _dot(q_tile, tl.trans(k_tile), ACC) * scale",
         "scores = _dot(q_tile, tl.trans(k_tile), ACC)", "scale dropped"),
        ("total = total * shrink + tl.sum(", "total = total + tl.sum(", "sum not rescaled"),
        ("acc = acc * shrink[:, None] + tile * weight[:, None]",
         "acc = acc * shrink[:, None] + tile", "pieces not weighted"),
        ("n = tl.minimum(size, tl.load(tok_start + seg + 1) - start)",
         "n = tl.minimum(size, tl.load(tok_start + seg + 1) - start + 1)", "off by one in offsets"),
        ("scores = tl.where((first + tl.arange(0, N) < n)[None, :], scores, float(\"-inf\"))",
         "scores = scores + 0", "columns past the segment"),
        ("mask=(row < n) & (col < D))\n\n\n@triton.jit\n@no_type_check\ndef _piece",
         "mask=(row < n + 1) & (col < D))\n\n\n@triton.jit\n@no_type_check\ndef _piece",
         "one row written too many"),
    ],
    "latent/__init__.py": [
        ("(W_k.to(wide) * norm_weight)", "W_k.to(wide)", "norm weight lost from the keys"),
        ("(W_v * norm_weight)", "W_v", "norm weight lost from the values"),
        ("1 / math.sqrt(d_head)", "1 / math.sqrt(x.shape[1])", "scale of the wrong width"),
    ],
    "distill/torch_backend.py": [
        ("z = z.div_(softcap).tanh_()", "z = z.div_(softcap)", "softcap missing"),
        ("z.mul_(slope)", "pass", "slope of the softcap missing"),
        ("mass * (top + total.log())", "(top + total.log())", "teacher's mass taken as 1"),
        ("(mass / total)[:, None]", "(1 / total)[:, None]", "mass missing in the gradient"),
        ("(top + total.log())", "(total.log())", "maximum not added back"),
        ("min(rows.stop, first + per_part)", "min(rows.stop - 1, first + per_part)",
         "last row skipped"),
        ("scatter_add_(1, idx, -p)", "scatter_add_(1, idx, p)", "sign of the target"),
    ],
    "distill/__init__.py": [("loss * weight", "loss", "weights ignored")],
    "triton_support.py": [
        ("tl.float64 if dtype == torch.float64 else tl.float32", "tl.float16",
         "accumulation in half precision"),
    ],
    "dispatch.py": [("enabled=False", "enabled=True", "autocast inside an op")],
}  # fmt: skip


FOLDERS = {
    "segmented_lora": "lora",
    "cross_attention": "cross",
    "latent_attention": "latent",
    "topk_distill": "distill",
}


def caught(file: str, old: str, new: str) -> bool:
    """Plant one fault and run the kernels' tests against it."""
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "d2l_kernels"
        shutil.copytree(ROOT / "kernels/d2l_kernels", package)
        source = (package / file).read_text()
        if source.count(old) < 1:
            raise SystemExit(f"{file} no longer holds {old!r}: renew the fault")
        (package / file).write_text(source.replace(old, new))
        op = next((name for name in FOLDERS if file.startswith(f"{FOLDERS[name]}/")), "")
        env = os.environ | {"PYTHONPATH": folder, "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
        if "triton" in file:
            env |= {"TRITON_INTERPRET": "1", "OPENBLAS_NUM_THREADS": "1"}
            command += [str(ROOT / "tests/support/interpreted_kernels.py"), "-k", op]
        else:
            command += [str(p) for p in sorted((ROOT / "tests/kernels").glob("test_*.py"))]
            command += ["-k", f"not compile and not triton and {op or 'test'}"]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        if done.returncode not in (0, 1):
            raise SystemExit(f"the tests did not run against {file}: {done.stdout[-2000:]}")
        return done.returncode == 1


def main() -> None:
    """Try every fault and report; an unchanged copy must pass."""
    if not sys.argv[1:] and caught("dispatch.py", "", ""):
        sys.exit("the tests fail without a fault")
    missed = []
    for file, faults in FAULTS.items():
        if sys.argv[1:] and not any(asked in file for asked in sys.argv[1:]):
            continue
        for old, new, what in faults:
            seen = caught(file, old, new)
            print(f"{'caught' if seen else 'MISSED'}  {file}: {what}", flush=True)
            missed += [] if seen else [what]
    sys.exit(f"{len(missed)} faults were not noticed" if missed else 0)


if __name__ == "__main__":
    main()
