"""Train a random tiny model for a few steps: ``python train_tiny.py RUN_DIR [KILL_AT]``.

KILL_AT "step" dies by SIGKILL between two steps, "save" in the middle of writing a checkpoint.
Under a launcher's environment variables it is one of several processes.
"""

import os
import random
import signal
import sys
from pathlib import Path

import torch
from tiny_models import doc_to_lora

from d2l.data.example import Example, Query
from d2l.train import TrainConfig, train

CONFIG = TrainConfig(
    steps=6,
    docs_per_step=4,
    docs_per_micro_batch=2,
    lr=1e-2,
    warmup=2,
    l1=0.1,
    checkpoint_every=2,
    log_every=1,
    eval_every=1,
    curriculum=3,
    curriculum_exact=0.0,
    stop_on="fall",
)


def examples(step: int, level: float) -> list[Example]:
    """Draw a batch from step and level: documents of 1 to 3 chunks, 1 or 2 queries each."""
    rng = random.Random(step)

    def tokens(n: int) -> tuple[int, ...]:
        return tuple(rng.randrange(3, 50) for _ in range(n))

    def query() -> Query:
        answer = tokens(rng.randint(1, 3))
        rows = [[-0.3, -1.5] for _ in answer]
        index = [tuple(rng.sample(range(50), 2)) for _ in answer]
        return Query(tokens(rng.randint(1, 4)), answer, tuple(map(tuple, rows)), tuple(index))

    return [
        Example(
            tuple(tokens(rng.randint(2, 6)) for _ in range(rng.randint(1, 1 + round(2 * level)))),
            tuple(query() for _ in range(rng.randint(1, 2))),
        )
        for _ in range(CONFIG.docs_per_step)
    ]


def run(run_dir: Path, kill_at: str = "", *, dropout: float = 0.0, **changes):
    """Train and return the model; the evaluation hook is where a run is killed."""
    torch.set_num_threads(1)
    model = doc_to_lora(mlp_dropout=dropout)

    def evaluate(done: int) -> dict[str, float]:
        if kill_at == "step" and done == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return {"probe": float(done), "fall": -float(done)}

    if kill_at == "save":
        torch.save = die_halfway(torch.save)
    config = TrainConfig(**{**vars(CONFIG), **changes})
    train(model, examples, config, run_dir, evaluate=evaluate)
    return model


def die_halfway(save):
    """Write checkpoints normally once, then half of one and die."""
    calls = []

    def write(state, path):
        calls.append(path)
        save(state, path)
        if len(calls) == 2:
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    return write


if __name__ == "__main__":
    patience = int(os.environ.get("TINY_PATIENCE", "0"))  # what is watched falls from the start
    dropout = float(os.environ.get("TINY_DROPOUT", "0"))
    optimizer = os.environ.get("TINY_OPTIMIZER", "adamw")
    changes = {"patience": patience, "optimizer": optimizer}
    run(Path(sys.argv[1]), *sys.argv[2:], dropout=dropout, **changes)
