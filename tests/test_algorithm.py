"""The two orchestrations of the algorithm, csrc/seq_loss.cpp and amn_kernels/algorithm.py, step by step: over the same
primitives they have the same row scalars, attention outputs, columns, values, Gram matrix, metrics and gradients.
"""

import weakref

import pytest
import torch
from combinations import CHOICES, inputs_of, label, options_of, sample, temperature_of

from amn_kernels import algorithm, infonce, ops, triton
from amn_kernels.algorithm import Saved
from amn_kernels.infonce import Exchange
from amn_kernels.options import DEFAULT_CHUNK_BYTES, TERMS, LossOptions, scratch_bytes
from amn_kernels.primitives import CompiledPrimitives, Row

pytestmark = pytest.mark.skipif(ops.why_unavailable() is not None, reason=str(ops.why_unavailable()))
without_triton = pytest.mark.skipif(
    triton.why_unavailable() is not None, reason=f"{triton.why_unavailable()}; see make test-triton"
)

NEEDS = ("pred", "target", "extra_negatives", "temperature")


def setting(case, device="cpu"):
    """Options, inputs by name, and what needs a gradient; every λ is 1, as in the ops."""
    options = {name: float(x > 0) if name in TERMS else x for name, x in options_of(case).items()}
    options = LossOptions(**options, chunk_bytes=case["chunk_bytes"])
    pred, target, tensors = inputs_of(case, device)
    if "infonce" not in options.terms:
        tensors.pop("extra_negatives", None)
    inputs = {"pred": pred, "target": target, **tensors}
    if (temperature := temperature_of(case, device)) is not None:
        inputs["temperature"] = temperature
    wanted = {"extra_negatives" if name == "extra" else name for name in case["gradients"].split()}
    return options, inputs, frozenset(name for name in NEEDS if name in wanted and name in inputs)


def in_cpp(options, inputs, needs):
    bits = sum(1 << i for i, name in enumerate(NEEDS) if name in needs)
    choices = ops.choices_of(options)
    given = [inputs.get(name) for name in ("pred", "target", "mask", "ids", "extra_negatives", "temperature")]
    keys_learn = not needs.isdisjoint(("target", "extra_negatives"))
    chunk_bytes = scratch_bytes(options, DEFAULT_CHUNK_BYTES["cpu"], keys_learn)
    _, *outputs, rows, attention, columns = torch.ops.amn_kernels._seq_loss_forward(
        *given[:2], None, *given[2:], *choices, chunk_bytes, bits
    )
    incoming = torch.linspace(0.5, 1.5, len(options.terms), dtype=outputs[0].dtype)
    gradients = torch.ops.amn_kernels._seq_loss_backward(
        None, None, incoming, *given, rows, attention, columns, *choices, bits
    )  # fmt: skip
    return outputs, Saved(rows, attention, columns), gradients


def in_python(prim, options, inputs, needs):
    values, gram, metrics, saved = algorithm.forward(prim, Exchange(), options, **inputs, needs=needs)
    incoming = torch.linspace(0.5, 1.5, len(options.terms), dtype=values.dtype, device=values.device)
    inputs = {name: x for name, x in inputs.items() if name not in ("mask", "ids")}
    gradients = algorithm.backward(prim, options, saved, incoming, **inputs, needs=needs)
    gram = values.new_empty(0, 0) if gram is None else gram
    return (values, gram, metrics), saved, [gradients[name] for name in NEEDS if name in needs]


def assert_same(prim, case, tolerance, device="cpu"):
    options, inputs, needs = setting(case, device)
    outputs, saved, gradients = in_python(prim, options, inputs, needs)
    host = {name: x.cpu() for name, x in inputs.items()}
    wanted_outputs, wanted, wanted_gradients = in_cpp(options, host, needs)

    def close(got, expected, what):
        """Relative to the largest, with which the others are summed; where that is infinite, the same are."""
        got, expected = got.cpu().double(), expected.double()
        assert got.shape == expected.shape, what
        finite = expected.isfinite()
        assert torch.equal(got[~finite], expected[~finite]), what
        scale = expected[finite].abs().max().item() if finite.any() else 0.0
        assert (got[finite] - expected[finite]).abs().le(tolerance * scale).all(), what

    for row in Row if len(wanted.rows) == len(Row) else list(Row)[: Row.COL_MAX]:
        close(saved.rows[row], wanted.rows[row], row.name)
    close(saved.attention, wanted.attention, "attention")
    for i, (column, expected) in enumerate(zip(saved.columns, wanted.columns, strict=True)):
        close(column, expected, f"column {i}")
    for name, output, expected in zip(("values", "gram", "metrics"), outputs, wanted_outputs, strict=True):
        close(output, expected, name)
    assert len(gradients) == len(wanted_gradients)
    for name, gradient, expected in zip(sorted(needs, key=NEEDS.index), gradients, wanted_gradients, strict=True):
        close(gradient, expected, f"gradient of {name}")


@pytest.mark.parametrize("case", sample(100, {**CHOICES, "dtype": (torch.float64,)}, candidates=100), ids=label)
def test_the_same_over_the_compiled_primitives(case):
    assert_same(CompiledPrimitives(), case, 1e-10)


@pytest.mark.parametrize("chunk_bytes", [1, 3000])
@pytest.mark.parametrize("case", sample(60, {**CHOICES, "dtype": (torch.float64,)}, candidates=100)[:25], ids=label)
def test_the_same_in_chunks_of_rows(monkeypatch, case, chunk_bytes):
    """Chunks so short that no group of these sizes is one; the compiled ones stay as they are."""
    for module in (algorithm, infonce):
        monkeypatch.setattr(module, "CHUNK_ROWS", 5)
    assert_same(CompiledPrimitives(), {**case, "chunk_bytes": chunk_bytes}, 1e-10)


@pytest.mark.parametrize("direction", ["pred_to_target", "both"])
def test_similarities_of_a_chunk_are_gone_before_the_next(monkeypatch, direction):
    """Memory is that of one chunk, its guide and its weights of 16 bits, not of two at a time."""
    seen = []
    similarities, weights = infonce.Infonce._similarities, infonce.Infonce._weights

    def kept():
        return sum(x() is not None for x in seen)

    def spy(self, *arguments):
        assert kept() == 0
        logits, pairs = similarities(self, *arguments)
        seen.extend(weakref.ref(x) for x in (logits, pairs.guide))
        return logits, pairs

    def spy_weights(self, *arguments):
        assert kept() == 2
        seen.append(weakref.ref(found := weights(self, *arguments)))
        return found

    monkeypatch.setattr(infonce.Infonce, "_similarities", spy)
    monkeypatch.setattr(infonce.Infonce, "_weights", spy_weights)
    monkeypatch.setattr(infonce, "CHUNK_ROWS", 5)
    pred, target = (torch.randn(1, 24, 7, dtype=torch.bfloat16) for _ in "pt")
    options = LossOptions(infonce=1.0, direction=direction, false_negative_margin=0.1, chunk_bytes=1)
    in_python(CompiledPrimitives(), options, {"pred": pred, "target": target}, {"pred"})
    assert len(seen) == (25 if direction == "both" else 15)


@without_triton
@pytest.mark.parametrize("case", sample(60, {**CHOICES, "dtype": (torch.float32,)}, candidates=100)[:12], ids=label)
def test_the_same_over_triton_primitives(case):
    """Here memory that nobody wrote is NaN under ttsem, which is not so inside an op."""
    from amn_kernels.triton.primitives import TritonPrimitives

    assert_same(TritonPrimitives(), case, 2e-5, "cuda")
