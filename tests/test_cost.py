"""The counted cost of a step, against counts by hand."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from amn_kernels.options import LossOptions
from amn_kernels.reference import eager
from bench.contenders import ALL_TERMS

cost = pytest.importorskip("bench.cost")
pytest.importorskip("triton")

N, D = 256, 64
OPTIONS = LossOptions(**ALL_TERMS, weighting="fixed")


@pytest.fixture(scope="module")
def chunks():
    return {work.name: work for work in cost.summed(cost.fused(N, torch.bfloat16, OPTIONS, D))}


def test_bytes_of_the_row_kernels(chunks):
    # By hand: bfloat16 rows of p and t are 2 bytes an element, o is float32; a row scalar is 8 bytes.
    half, single = N * D * 2, N * D * 4
    assert chunks["row_stats"].minimum == 2 * half
    assert chunks["row_dots"].minimum == 2 * half + 2 * single
    assert chunks["row_combine"].minimum == 3 * half + single
    assert chunks["softmax_rows"].minimum == N * N * (4 + 2)
    assert chunks["row_stats"].read == 2 * half + 8 * N  # the weight
    assert chunks["row_stats"].written == 14 * 8 * N + 4 * N  # the other plain scalars, and the scale of the key
    assert chunks["row_combine"].written == half


def test_products_are_two_of_n_n_d(chunks):
    assert chunks["bmm"].flops == 4 * N * N * D
    assert chunks["bmm"].count == 2


def test_products_are_those_of_the_flop_counter():
    pred, target = torch.randn(N, D).requires_grad_(), torch.randn(N, D)
    with FlopCounterMode(display=False) as counter:
        eager.seq_loss(pred, target, **ALL_TERMS).backward()
    assert sum(work.flops for work in cost.plain(N, torch.float32, D)) == counter.get_total_flops()


def test_small_groups_are_two_launches_with_the_flops_of_two_products():
    work = cost.fused(32, torch.float32, OPTIONS, D)
    assert [w.name for w in work] == ["small_groups", "row_combine"]
    assert work[0].flops == 4 * 32 * 32 * D
    # p and t once in, o once out.
    assert work[0].minimum == 3 * 32 * D * 4


def test_eager_moves_more():
    ours, theirs = cost.fused(N, torch.bfloat16, OPTIONS, D), cost.plain(N, torch.bfloat16, D)
    assert sum(w.moved for w in theirs) > 2 * sum(w.moved for w in ours)


def test_prediction_is_the_longer_of_bytes_and_operations():
    device = cost.Device(processors=4, bandwidth=10.0, fp32=100.0, bf16=1000.0, source="")
    work = [cost.Work("a", read=20, written=10, flops=100), cost.Work("b", flops=1000, count=2)]
    assert cost.predict(work, device, "fp32") == pytest.approx(3 + 10 + 3 * cost.LAUNCH_SECONDS)
    assert cost.predict(work, device, "bf16") == pytest.approx(3 + 1 + 3 * cost.LAUNCH_SECONDS)
    alone = [cost.Work("c", read=10, programs=1), cost.Work("d", read=10, programs=8)]
    assert cost.predict(alone, device, "fp32") == pytest.approx(4 + 1 + 2 * cost.LAUNCH_SECONDS)


def test_products_of_the_peers():
    """By hand: N²D multiply-adds of similarities, twice, and of the query gradient; Inf-CL for the keys once more, with
    their similarities."""
    n2d = 2 * N * N * D
    assert {name: work.flops for name, work in cost.peers(N, torch.bfloat16, D).items()} == {
        "Inf-CL": 5 * n2d,
        "cut-cross-entropy": 3 * n2d,
    }


def test_accesses_are_read_from_the_code():
    loads, stores = cost.accesses(
        """
  tt.func public @k(%x: !tt.ptr<f32> {tt.divisibility = 16 : i32}, %out: !tt.ptr<f32>, %n: i32) {
    %0 = tt.splat %x : !tt.ptr<f32> -> tensor<4x!tt.ptr<f32>>
    %1 = tt.addptr %0, %c : tensor<4x!tt.ptr<f32>>, tensor<4xi32>
    %2 = tt.load %1 : tensor<4x!tt.ptr<f32>>
    %3 = tt.load %1 : tensor<4x!tt.ptr<f32>>
    %4 = tt.addptr %out, %c : !tt.ptr<f32>, i32
    tt.store %4, %2 : !tt.ptr<f32>
"""
    )
    assert {name: len(found) for name, found in loads.items()} == {"x": 1}
    assert {name: len(found) for name, found in stores.items()} == {"out": 1}
