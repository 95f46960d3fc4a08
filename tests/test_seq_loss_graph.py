"""The graph of the compiled op: its backward may take the memory of what was saved, and only when nobody looks."""

from pathlib import Path

import pytest
import torch
from error_rule import TERMS, make_rows

from amn_kernels import functional

FORMS = {
    "plain": ((65, 7), {}),
    "several chunks": ((65, 7), {"chunk_bytes": 1}),
    "both": ((65, 7), {"direction": "both"}),
    "sequence": ((5, 13, 7), {"negatives": "sequence"}),
    "step": ((5, 13, 7), {"negatives": "step"}),  # groups lie across the memory of pred
    "columns": ((65, 7), {"moment": 0.5, "variance": 0.5}),
}


def loss_of(shape, target_learns=False, dtype=torch.float32, **options):
    pred, target = (x.requires_grad_() for x in make_rows(*shape, dtype=dtype))
    if not target_learns:
        target.requires_grad_(False)
    loss, _ = functional.seq_loss(pred, target, backend="cpu", **{"weighting": "fixed", **TERMS["all"], **options})
    return loss, [x for x in (pred, target) if x.requires_grad]


@pytest.mark.parametrize("target_learns", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_a_kept_graph_gives_the_same_gradients_again(form, target_learns):
    shape, options = FORMS[form]
    loss, leaves = loss_of(shape, target_learns, **options)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    copies = [x.clone() for x in first]
    again = torch.autograd.grad(loss, leaves, retain_graph=True)
    last = torch.autograd.grad(loss, leaves)
    for gradients in (first, again, last):
        assert all(torch.equal(gradient, copy) for gradient, copy in zip(gradients, copies, strict=True))


@pytest.mark.parametrize("target_learns", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_a_gradient_has_memory_of_its_own(form, target_learns):
    shape, options = FORMS[form]
    loss, leaves = loss_of(shape, target_learns, **options)
    gradients = torch.autograd.grad(loss, leaves)
    storages = {x.untyped_storage().data_ptr() for x in (*gradients, *leaves)}
    assert len(storages) == 2 * len(leaves)
    for gradient, leaf in zip(gradients, leaves, strict=True):
        assert gradient.untyped_storage().nbytes() == leaf.nbytes
        assert gradient.is_contiguous()
        assert gradient._base is None


def test_create_graph_leaves_the_first_gradient_alone():
    loss, leaves = loss_of((65, 7))
    (wanted,) = torch.autograd.grad(loss, leaves, retain_graph=True)
    (first,) = torch.autograd.grad(loss, leaves, create_graph=True)
    first.square().sum().backward()
    assert torch.equal(first, wanted)


def made_of_one_another(pred, target):
    """Arguments of the loss by what is special of them."""
    return {
        "all leaves": ((pred, target), {}),
        "target made of pred": ((pred, pred.flip(0).sin()), {}),
        "extra negatives made of target": ((pred, target), {"extra_negatives": 1.5 * target[:2] + 0.1}),
    }


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("outer", [lambda loss: loss, torch.square], ids=["loss", "its square"])
@pytest.mark.parametrize("arguments", made_of_one_another(*make_rows(2, 2)))
def test_second_derivatives_walk_each_path_once(arguments, outer, create_graph):
    """As the plain definition has them, also where the incoming gradient or an argument depends on another one."""
    derivatives = []
    for backend in ("cpu", "reference"):
        leaves = [x.requires_grad_() for x in make_rows(5, 3, dtype=torch.float64)]
        rows, further = made_of_one_another(*leaves)[arguments]
        options = {"mse": 1.0, "infonce": 1.0, "temperature": 0.5, "weighting": "fixed", "backend": backend}
        loss, _ = functional.seq_loss(*rows, **further, **options)
        (first,) = torch.autograd.grad(outer(loss), leaves[0], create_graph=True)
        second = torch.autograd.grad(first.square().sum(), leaves, create_graph=create_graph, allow_unused=True)
        found = [x for x in second if x is not None]
        if create_graph:
            found += torch.autograd.grad(found[0].sum(), leaves[:1])
        derivatives.append(found)
    for got, wanted in zip(*derivatives, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)  # float64 rounding


def test_a_double_backward_under_autocast_is_one_of_float32():
    penalties = []
    for enabled in (False, True):
        loss, leaves = loss_of((33, 32))
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            (first,) = torch.autograd.grad(loss, leaves, create_graph=True)
            penalties.append(torch.autograd.grad(first.square().sum(), leaves)[0])
    assert torch.equal(*penalties)


def test_whoever_keeps_saved_tensors_finds_them_unchanged():
    kept = []

    def pack(x):
        kept.append((x, x.clone()))
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss, leaves = loss_of((65, 7))
    (gradient,) = torch.autograd.grad(loss, leaves)
    assert any(x.shape == (65, 7) and not x.requires_grad for x, _ in kept)  # the attention
    for x, copy in kept:
        torch.testing.assert_close(x, copy, rtol=0, atol=0)
    assert torch.equal(gradient, torch.autograd.grad(*loss_of((65, 7)))[0])


def test_hooks_get_the_gradient():
    (wanted,) = torch.autograd.grad(*loss_of((65, 7)))
    loss, (leaf,) = loss_of((65, 7))
    got = []
    leaf.register_hook(lambda gradient: got.append(gradient) or 2 * gradient)
    loss.backward()
    assert torch.equal(got[0], wanted)
    assert torch.equal(leaf.grad, 2 * wanted)


def test_batched_incoming_gradients_are_refused():
    """`is_grads_batched` runs the backward under vmap, on tensors that are no memory to read."""
    loss, leaves = loss_of((9, 7))
    with pytest.raises(RuntimeError, match="Batching rule not implemented"):
        torch.autograd.grad(loss, leaves, torch.tensor([1.0, 2.0]), is_grads_batched=True)


PEAK = """
import ctypes, pathlib, sys, torch
from amn_kernels import functional
def resident(field):
    return int(pathlib.Path("/proc/self/status").read_text().split(field + ":")[1].split()[0]) * 1024
def step(pred, target, **backward):
    loss = functional.seq_loss(pred, target, infonce=1.0, weighting="fixed", backend="cpu")[0]
    loss.backward(**backward)
make = lambda dim: (torch.randn(256, dim, requires_grad=True), torch.randn(256, dim, requires_grad="both" in sys.argv))
step(*make(8))  # loads libraries, starts threads
rows = make(32768)
ctypes.CDLL(None).malloc_trim(0)
pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = resident("VmRSS")
step(*rows, retain_graph="kept" in sys.argv)
print(resident("VmHWM") - before)
"""


@pytest.mark.parametrize("learns", ["pred", "both"])
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak of a process")
def test_memory_of_the_gradient(run_python, learns):
    """The gradients, 32 MiB each here, are written over the attention of the forward, unless the graph is kept."""
    given_up, kept = (run_python(PEAK, learns, graph) for graph in ("given up", "kept"))
    assert given_up.returncode == kept.returncode == 0, given_up.stderr + kept.stderr
    size = 256 * 32768 * 4 * (2 if learns == "both" else 1)
    # Scratch is 1/4 MiB; the rest is left to the allocator and to the buffers of the matrix product.
    assert int(given_up.stdout) < 1.4 * size
    assert int(kept.stdout) - int(given_up.stdout) > 0.8 * size


def test_the_gradients_of_pred_and_target_outlive_each_other():
    """They lie in one piece of memory, which the last of them gives back."""
    loss, leaves = loss_of((257, 384), target_learns=True)
    wanted = [x.clone() for x in torch.autograd.grad(loss, leaves, retain_graph=True)]
    first, second = torch.autograd.grad(loss, leaves)
    assert second.data_ptr() - first.data_ptr() == first.nbytes
    del loss, first
    others = [torch.randn(2 * 257, 384) for _ in range(16)]  # would take what was freed
    assert torch.equal(second, wanted[1])
    del others


KEPT = """
import ctypes, pathlib, sys, torch
from amn_kernels import functional
def resident():
    return int(pathlib.Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) * 1024
rows = torch.randn(256, 32768), torch.randn(256, 32768)
extra = torch.randn(2, 32768)
learns = {"target": rows[1], "extra": extra}[sys.argv[1]]
if sys.argv[1] == "extra":
    rows[0].requires_grad_()
learns.requires_grad_()
def step():
    loss = functional.seq_loss(*rows, infonce=1.0, weighting="fixed", backend="cpu", extra_negatives=extra)[0]
    loss.backward()
    rows[0].grad = None
step()
learns.grad = None
ctypes.CDLL(None).malloc_trim(0)
before = resident()
step()
ctypes.CDLL(None).malloc_trim(0)
print(resident() - before - learns.grad.nbytes)
"""


@pytest.mark.parametrize("learns", ["target", "extra"])
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells the memory of a process")
def test_a_gradient_keeps_no_other_memory(run_python, learns):
    """That of target alone, or a small one of extra negatives beside pred's, which is given up: 32 MiB each."""
    done = run_python(KEPT, learns)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 8 << 20


@pytest.mark.parametrize(("learns", "products"), [("pred", 2), ("target", 2), ("extra", 3), ("pred target", 3)])
def test_products_are_those_that_a_gradient_needs(learns, products):
    """S, and O for pred, Q for target; with extra negatives S comes in two parts. Keys alone need no O."""
    pred, target = make_rows(40, 24)
    tensors = {"pred": pred, "target": target, "extra": make_rows(3, 24, seed=3)[0]}
    for name in learns.split():
        tensors[name].requires_grad_()
    further = {"extra_negatives": tensors["extra"]} if "extra" in learns else {}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        functional.seq_loss(pred, target, infonce=1.0, weighting="fixed", backend="cpu", **further)
    assert sum(event.name in ("aten::mm", "aten::addmm") for event in profile.events()) == products
