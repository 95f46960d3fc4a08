"""One batch over several processes equals one process with all rows: ranks.py under torchrun, with gloo."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from error_rule import make_rows

from amn_kernels import FusedSeqLoss, functional

SCRIPT = Path(__file__).parent / "ranks.py"


def torchrun(ranks, *arguments):
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(ranks),
            SCRIPT,
            *arguments,
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(SCRIPT.parent), *sys.path])},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize("ranks", [2, 4])
def test_equals_one_process(ranks):
    process = torchrun(ranks)
    assert process.returncode == 0, process.stderr[-5000:]
    assert int(process.stdout.split()[0]) >= 30


def test_a_rank_that_dies_is_an_error_for_the_others():
    process = torchrun(3, "killed")
    assert process.returncode == 0, process.stderr[-5000:]
    assert process.stdout.count("got") == 2


def test_without_a_process_group():
    pred, target = make_rows(4, 3)
    with pytest.raises(ValueError, match=r"gather_negatives can't be served.*not initialised"):
        functional.seq_loss(pred, target, infonce=1.0, gather_negatives=True)
    with pytest.raises(ValueError, match=r"backend='cpu' can't serve this call.*not initialised"):
        FusedSeqLoss(infonce=1.0, gather_negatives=True, backend="cpu")(pred, target)
    with pytest.raises(ValueError, match=r"backend='reference' can't serve this call.*over ranks"):
        FusedSeqLoss(infonce=1.0, gather_negatives=True, backend="reference")(pred, target)


def test_one_rank_alone(tmp_path):
    """A group of one: the Python algorithm over the compiled primitives equals the compiled op."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        pred, target = make_rows(6, 5, 7, dtype=torch.float64)
        for negatives, direction in (("all", "both"), ("step", "pred_to_target"), ("sequence", "both")):
            options = {"infonce": 1.0, "moment": 0.5, "negatives": negatives, "direction": direction}
            losses = []
            for group in (None, torch.distributed.group.WORLD):
                leaf = pred.clone().requires_grad_()
                criterion = FusedSeqLoss(**options, process_group=group)
                loss = criterion(leaf, target, extra_negatives=pred[0])
                loss.backward()
                losses.append((loss.detach(), leaf.grad, criterion.stats.gram, criterion.stats.metrics))
            for got, wanted in zip(*losses, strict=True):
                torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-13)
        assert copy.deepcopy(criterion).options.process_group is torch.distributed.group.WORLD
    finally:
        torch.distributed.destroy_process_group()
