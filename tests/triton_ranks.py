"""Run by torchrun from test_triton_op.py: two ranks under ttsem, with keys in the ring, against all rows alone."""

import torch
import torch.distributed as dist
import ttsem_cache
from error_rule import make_rows, relative_error
from ttsem import sanitize

from amn_kernels import FusedSeqLoss

CASES = (
    ({"infonce": 0.7, "cosine": 0.5}, ("pred",)),
    ({"infonce": 0.7, "moment": 0.4, "direction": "both", "false_negative_margin": 0.6}, ("pred", "target")),
)
SIZES = (5, 9)
"""Rows of each rank."""


def run(criterion, pred, target, wanted):
    leaves = {"pred": pred.detach().clone(), "target": target.detach().clone()}
    for name in wanted:
        leaves[name].requires_grad_()
    loss = criterion(leaves["pred"], leaves["target"])
    return loss.detach(), torch.autograd.grad(loss, [leaves[name] for name in wanted])


def main():
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    ttsem_cache.install()
    for options, wanted in CASES:
        options = {"temperature": 0.3, **options}
        pred, target = make_rows(sum(SIZES), 6, distance=0.7)
        alone, gradients = run(FusedSeqLoss(**options, backend="reference"), pred, target, wanted)
        with sanitize.session() as session:
            mine = [x.split(SIZES)[rank].to("cuda") for x in (pred, target)]
            together = FusedSeqLoss(**options, gather_negatives=True, backend="triton").to("cuda")
            loss, found = run(together, *mine, wanted)
            assert session.launches > 5
        assert relative_error(loss, alone) <= 3e-6
        for gradient, whole in zip(found, gradients, strict=True):
            assert relative_error(gradient / ranks, whole.split(SIZES)[rank]) <= 3e-6
    dist.barrier()
    if rank == 0:
        print(len(CASES), "cases equal one process")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
