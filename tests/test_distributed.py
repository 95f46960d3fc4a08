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
    assert int(process.stdout.split()[0]) >= 90


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


@pytest.fixture
def group_of_one(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


def test_one_rank_alone(group_of_one):
    """A group of one: the Python algorithm over the compiled primitives equals the compiled op."""
    pred, target = make_rows(6, 5, 7, dtype=torch.float64)
    for negatives, direction in (("all", "both"), ("step", "pred_to_target"), ("sequence", "both")):
        options = {"infonce": 1.0, "moment": 0.5, "negatives": negatives, "direction": direction}
        losses = []
        for group in (None, group_of_one):
            leaf = pred.clone().requires_grad_()
            criterion = FusedSeqLoss(**options, process_group=group)
            loss = criterion(leaf, target, extra_negatives=pred[0])
            loss.backward()
            losses.append((loss.detach(), leaf.grad, criterion.stats.gram, criterion.stats.metrics))
        for got, wanted in zip(*losses, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-13)
    assert copy.deepcopy(criterion).options.process_group is group_of_one


@pytest.mark.parametrize("outer", [lambda loss: loss, torch.square], ids=["loss", "its square"])
@pytest.mark.parametrize("learns", ["pred", "target", "extra", "temperature"])
def test_a_second_derivative_over_ranks_is_an_error(group_of_one, learns, outer):
    """Not a gradient from which the penalty is missing. The first derivative is right all the same."""
    pred, target = make_rows(6, 5, dtype=torch.float64)
    options = {"infonce": 1.0, "weighting": "fixed", "learnable_temperature": learns == "temperature"}
    criterion = FusedSeqLoss(**options, process_group=group_of_one)
    leaves = {"pred": pred, "target": target, "extra": make_rows(3, 5, dtype=torch.float64, seed=1)[0]}
    leaves["temperature"] = getattr(criterion, "log_temperature", None)
    leaf = leaves[learns].requires_grad_()
    loss = outer(criterion(pred, target, extra_negatives=leaves["extra"]))
    (plain,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    (first,) = torch.autograd.grad(loss, leaf, create_graph=True)
    assert torch.equal(first, plain)
    with pytest.raises(RuntimeError, match="no double backward"):
        (loss + first.square().sum()).backward()
