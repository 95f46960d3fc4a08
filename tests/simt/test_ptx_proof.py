"""sentryward takes our PTX, proves a kernel with barriers and refutes it without one. All of them: `make ptx-proof`."""

import pytest

from tests import ptx_proof

pytestmark = pytest.mark.skipif(
    ptx_proof.why_unavailable() is not None, reason=f"no proof: {ptx_proof.why_unavailable()}"
)


@pytest.fixture(autouse=True)
def _nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(ptx_proof, "KEPT", tmp_path / "kept")


def test_kernels_are_proven(tmp_path):
    entries = ptx_proof.compiled(ptx_proof.SOURCES, tmp_path, ("softmax_cols.cu", "mirror.cu"))
    proven = {}
    for launch in ptx_proof.launches():
        if entry := entries.get(ptx_proof.instance(launch)):
            proven[launch.kernel] = ptx_proof.prove(launch, entry, tmp_path).verdict
    assert proven == {
        "softmax_cols_kernel": ptx_proof.PROVEN_ON_PATHS,
        "col_factors_kernel": ptx_proof.PROVEN_ON_PATHS,
        "mirror_rows_kernel": ptx_proof.PROVEN_ON_PATHS,
        "mirror_columns_kernel": ptx_proof.PROVEN,
    }


def test_a_deleted_barrier_is_refuted():
    found = ptx_proof.detect(ptx_proof.MUTATIONS[0])
    assert found.verdict == "refuted"
    assert "race" in found.note


def test_a_kernel_that_takes_too_long_is_not_verified(tmp_path):
    launch = next(x for x in ptx_proof.launches() if x.kernel == "softmax_cols_kernel")
    entry = ptx_proof.compiled(ptx_proof.SOURCES, tmp_path, ("softmax_cols.cu",))[ptx_proof.instance(launch)]
    found = ptx_proof.prove(launch, entry, tmp_path, seconds=1e-3)
    assert found.verdict == "not verified"
    assert "timeout" in found.note
