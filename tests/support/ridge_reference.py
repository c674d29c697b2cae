"""The ridge regression that `d2l.ridge` solves, by least squares on stacked rows."""

import math

import numpy as np


def regressed(A, B, penalty):
    """What rows say on what wakes them, as least squares with penalised weights finds it."""
    d_in, size = A.shape[1], (A**2).sum(-1).mean()
    rows = np.concatenate([A, math.sqrt(penalty * size) * np.eye(d_in)])
    said = np.concatenate([B, np.zeros((d_in, B.shape[1]))])
    return size * (1 + penalty) * np.linalg.lstsq(rows, said, rcond=None)[0].T
