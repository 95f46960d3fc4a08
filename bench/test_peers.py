"""InfoNCE, forward + backward, against other libraries' losses, on the same input and computing the same thing."""

import pytest
import torch

from amn_kernels import FusedSeqLoss
from bench import peers
from bench.contenders import inputs, step
from bench.test_seq_loss import DIM, interleave

TEMPERATURE = 0.07
# Rounds so that each size takes about 10 s on two cores.
ROUNDS = {256: 10, 1024: 30, 4096: 7}


@pytest.mark.parametrize("rows", sorted(ROUNDS))
@pytest.mark.parametrize("direction", ["pred_to_target", "both"])
def test_peers(benchmark, direction, rows, smoke):
    """Both directions are ClipLoss's; pytorch-metric-learning needs half a second at 256 rows and is run there only."""
    if smoke and rows > 256:
        pytest.skip("smoke run: small sizes only")
    pred, target = inputs(rows, DIM)
    both = direction == "both"
    rivals = {"MultipleNegativesRankingLoss": peers.ranking(TEMPERATURE, both=both)}
    if both:
        rivals["ClipLoss"] = peers.clip(TEMPERATURE)
    elif rows <= 256:
        rivals["NTXentLoss"] = peers.ntxent(TEMPERATURE)
    ours = FusedSeqLoss(mse=0.0, infonce=1.0, temperature=TEMPERATURE, direction=direction, weighting="fixed")
    for name, peer in rivals.items():
        torch.testing.assert_close(peer(pred, target), ours(pred, target), rtol=1e-5, atol=0, msg=name)
    benchmark.extra_info.update(kind="peers", rows=rows, dim=DIM, direction=direction)
    runs = {name: step(peer, pred, target) for name, peer in rivals.items()}
    interleave(benchmark, step(ours, pred, target), runs, 3 if smoke else ROUNDS[rows])
