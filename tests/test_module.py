"""FusedSeqLoss as a module: autocast, autograd in every form, state, and what it reports."""

import copy
import dataclasses
import inspect
import pickle

import pytest
import torch
from error_rule import TERMS, make_rows, relative_error, truth

from amn_kernels import FusedSeqLoss, functional
from amn_kernels.options import LossOptions

# Fixed weights, so that a result depends on its input alone; tests of the weightings are in test_weighting.py.
ALL = {"mse": 1.0, "cosine": 0.5, "infonce": 0.25, "weighting": "fixed"}


def gradient(criterion, pred, target):
    leaf = pred.detach().clone().requires_grad_()
    loss = criterion(leaf, target)
    loss.backward()
    return loss.detach(), leaf.grad


PENALISED = {
    "direction": {"direction": "both"},
    "positives": {"positives": "ids"},
    "false_negative_margin": {"false_negative_margin": 0.8},
    "variance": {"variance": 0.5, "moment": 0.5},
    "targets": {},
    "mask": {},
    "extra": {},
    "step": {"negatives": "step"},
    "temperature": {"learnable_temperature": True},
}


@pytest.mark.parametrize("weighting", ["fixed", "gradient"])
@pytest.mark.parametrize("option", PENALISED)
def test_double_backward_of_options(option, weighting):
    """A gradient penalty: the gradient of the norm of the gradient, against the reference's."""
    shape = (3, 5, 4) if option == "step" else (5, 4)
    pred, target = make_rows(*shape, dtype=torch.float64)
    tensors = {
        "positives": {"ids": torch.tensor([0, 1, 0, 2, 1])},
        "mask": {"mask": torch.tensor([True, True, False, True, True])},
        "extra": {"extra_negatives": make_rows(3, 4, dtype=torch.float64, seed=1)[0]},
    }.get(option, {})
    results = []
    for backend in ("cpu", "reference"):
        given = {name: x.clone().requires_grad_(x.is_floating_point()) for name, x in tensors.items()}
        leaves = [x.clone().requires_grad_(option == "targets" or i == 0) for i, x in enumerate((pred, target))]
        criterion = FusedSeqLoss(infonce=1.0, weighting=weighting, backend=backend, **PENALISED[option])
        if option == "temperature":
            criterion.log_temperature.data.fill_(0.3)  # it has moved since it was the option's
        wanted = [x for x in (*leaves, *given.values(), *criterion.parameters()) if x.requires_grad]
        first = torch.autograd.grad(criterion(*leaves, **given), wanted, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in first), wanted))
    for got, true in zip(*results, strict=True):
        assert true.norm() > 0
        assert relative_error(got, true) <= 1e-10


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_autocast_changes_nothing(backend):
    """The loss is computed in float32 from what it is given, whatever autocast would do to its parts."""
    pred, target = make_rows(65, 32)
    pred = pred.bfloat16()
    criterion = FusedSeqLoss(backend=backend, **ALL)
    loss, grad = gradient(criterion, pred, target)
    leaf = pred.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        got_loss = criterion(leaf, target)
    got_loss.backward()
    assert got_loss.dtype == torch.float32
    assert torch.equal(got_loss, loss)
    assert torch.equal(leaf.grad, grad)
    assert leaf.grad.dtype == torch.bfloat16


def test_training_step_under_autocast():
    linear = torch.nn.Linear(32, 32)
    inputs, target = make_rows(65, 32)
    criterion = FusedSeqLoss(backend="cpu", **ALL)
    with torch.autocast("cpu", torch.bfloat16):
        pred = linear(inputs)
        assert pred.dtype == torch.bfloat16
        loss = criterion(pred, target)
    loss.backward()
    true = truth(pred, target, **ALL)
    assert loss.item() == pytest.approx(true.loss.item(), rel=1e-6)  # float32 logits of 1/0.07
    wanted = true.grad.T @ inputs.double()
    # The gradient of pred is rounded to bfloat16, and so is the matrix product of the layer.
    assert relative_error(linear.weight.grad, wanted) <= 2 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gradients_accumulate(backend):
    criterion = FusedSeqLoss(backend=backend, **ALL)
    batches = [make_rows(33, 7, seed=seed) for seed in (0, 1)]
    leaf = batches[0][0].clone().requires_grad_()
    wanted = sum(gradient(criterion, leaf, target)[1] for _, target in batches)
    for _, target in batches:
        criterion(leaf, target).backward()
    torch.testing.assert_close(leaf.grad, wanted)
    leaf.grad = None
    sum(criterion(leaf, target) for _, target in batches).backward()
    torch.testing.assert_close(leaf.grad, wanted)


def test_backward_twice_needs_retain_graph():
    pred, target = make_rows(33, 7)
    criterion = FusedSeqLoss(backend="cpu", **ALL)
    leaf = pred.clone().requires_grad_()
    loss = criterion(leaf, target)
    loss.backward(retain_graph=True)
    once = leaf.grad.clone()
    loss.backward()
    assert torch.equal(leaf.grad, 2 * once)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("term", TERMS)
def test_large_incoming_gradient(term):
    """A GradScaler's factor is larger than float16 can hold; only the result has to fit."""
    pred, target = make_rows(257, 64, dtype=torch.float16)
    leaf = pred.clone().requires_grad_()
    (FusedSeqLoss(backend="cpu", weighting="fixed", **TERMS[term])(leaf, target) * 65536.0).backward()
    true = truth(pred, target, 65536.0, **TERMS[term])
    assert true.grad.abs().max() < torch.finfo(torch.float16).max
    assert relative_error(leaf.grad, true.grad) <= 0.51 * torch.finfo(torch.float16).eps  # one rounding to float16


def test_loss_can_be_weighted_and_negated():
    pred, target = make_rows(33, 7)
    criterion = FusedSeqLoss(backend="cpu", **ALL)
    leaf = pred.clone().requires_grad_()
    (-3.0 * criterion(leaf, target)).backward()
    torch.testing.assert_close(leaf.grad, -3.0 * gradient(criterion, pred, target)[1])


@pytest.mark.parametrize("term", TERMS)
def test_double_backward(term):
    pred, target = make_rows(6, 5, dtype=torch.float64)

    def loss(pred):
        return functional.seq_loss(pred, target, backend="cpu", temperature=0.5, weighting="fixed", **TERMS[term])[0]

    assert torch.autograd.gradcheck(loss, pred.requires_grad_())
    assert torch.autograd.gradgradcheck(loss, pred)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_penalty(dtype):
    results = {}
    for backend in ("cpu", "reference"):
        torch.manual_seed(0)
        linear = torch.nn.Linear(7, 7, dtype=dtype)
        inputs, target = make_rows(33, 7, dtype=dtype)
        pred = linear(inputs)
        loss = FusedSeqLoss(backend=backend, monitor=(), **ALL)(pred, target)
        (grad,) = torch.autograd.grad(loss, pred, create_graph=True)
        (loss + grad.square().sum()).backward()
        results[backend] = linear.weight.grad
    # Rounding, times the size of logits up to 1/0.07.
    assert relative_error(results["cpu"], results["reference"]) <= 20 * torch.finfo(dtype).eps


def test_learnable_temperature():
    pred, target = make_rows(33, 7)
    criterion = FusedSeqLoss(mse=0.0, infonce=1.0, temperature=0.2, learnable_temperature=True, weighting="fixed")
    assert set(criterion.state_dict()) == {"log_temperature"}
    loss = criterion(pred, target)
    loss.backward()
    # dL/d(ln tau) = tau dL/dtau, here by a central difference in float64, good to h^2.
    h = 1e-4

    def at(log_tau):
        return truth(pred, target, mse=0.0, infonce=1.0, temperature=log_tau.exp().item()).loss

    log_tau = torch.tensor(0.2, dtype=torch.float64).log()
    wanted = (at(log_tau + h) - at(log_tau - h)) / (2 * h)
    assert criterion.log_temperature.grad.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert loss.item() == pytest.approx(at(log_tau).item(), rel=1e-6)
    with torch.no_grad():
        criterion.log_temperature.fill_(torch.tensor(0.7).log())
    assert criterion(pred, target).item() == pytest.approx(
        at(torch.tensor(0.7, dtype=torch.float64).log()).item(), rel=1e-6
    )


def test_a_fixed_temperature_is_no_state():
    criterion = FusedSeqLoss(infonce=1.0, weighting="fixed")
    assert criterion.state_dict() == {}
    assert list(criterion.parameters()) == []


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize(
    "make_copy", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
def test_copies_compute_the_same(make_copy, called):
    pred, target = make_rows(33, 7)
    criterion = FusedSeqLoss(infonce=0.5, temperature=0.2, learnable_temperature=True, weighting="fixed")
    if called:
        criterion(pred.requires_grad_(), target)
    twin = make_copy(criterion)
    assert twin.options == criterion.options
    assert torch.equal(twin(pred, target), criterion(pred, target))
    with torch.no_grad():
        twin.log_temperature.add_(1)
    twin(pred, target)
    assert twin.stats.value["infonce"] != criterion.stats.value["infonce"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_learned_temperature_may_be_cast_with_the_model(dtype):
    """It is computed from in the dtype of the loss; the gradient is in its own."""
    pred, target = make_rows(33, 7)
    options = {"mse": 0.0, "infonce": 1.0, "temperature": 1.0, "weighting": "fixed"}  # ln 1 is a number of any dtype
    plain, cast = (FusedSeqLoss(**options, learnable_temperature=True) for _ in range(2))
    for criterion in (plain, cast.to(dtype)):
        criterion(pred, target).backward()
    assert cast(pred, target).item() == plain(pred, target).item()
    assert cast.log_temperature.grad.dtype is dtype
    wanted = plain.log_temperature.grad.item()
    assert cast.log_temperature.grad.item() == pytest.approx(wanted, rel=torch.finfo(dtype).eps + 1e-6)


def test_a_learned_temperature_must_be_where_pred_is():
    criterion = FusedSeqLoss(infonce=1.0, learnable_temperature=True, weighting="fixed").to("meta")
    with pytest.raises(ValueError, match=r"the loss is on meta, pred on cpu: move it with \.to\('cpu'\)"):
        criterion(*make_rows(5, 3))


@pytest.mark.parametrize(
    "change", [lambda x: x.half(), lambda x: x.to(torch.bfloat16), lambda x: x.half().float(), lambda x: x.double()]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_casting_the_module_leaves_the_weights_alone(change, dtype):
    pred, target = make_rows(33, 7, dtype=dtype)
    options = {"mse": 0.1, "infonce": 0.3, "weighting": "fixed"}  # neither is a float16, a bfloat16 or a float32 number
    plain, cast = FusedSeqLoss(**options), change(FusedSeqLoss(**options))
    wanted = plain(pred, target)
    assert torch.equal(cast(pred, target), wanted)
    assert cast.stats.as_dict() == plain.stats.as_dict()
    # As a number of the dtype of the loss.
    assert cast.stats.weight["mse"] == torch.tensor(0.1, dtype=dtype)


def ones(gram, values):
    """A weighting by a function."""
    return torch.ones_like(values)


def test_casting_leaves_the_weights_of_a_function_alone():
    pred, target = make_rows(33, 7)
    criterion = FusedSeqLoss(mse=0.1, infonce=1e-8, weighting=ones).half()
    criterion(pred.requires_grad_(), target)
    assert criterion.stats.weights.tolist() == pytest.approx([0.1, 1e-8], rel=1e-6)


@pytest.mark.parametrize("weighting", ["fixed", "gradient", ones])
def test_made_without_memory_and_filled_from_a_checkpoint(weighting):
    """As large models are: what is not in the checkpoint follows from the options."""
    pred, target = make_rows(33, 7)
    options = {"mse": 0.1, "infonce": 0.3, "weighting": weighting}
    wanted = FusedSeqLoss(**options)
    wanted(pred.clone().requires_grad_(), target)
    with torch.device("meta"):
        criterion = FusedSeqLoss(**options)
    criterion.to_empty(device="cpu").load_state_dict(wanted.state_dict())
    for name, buffer in criterion.named_buffers():
        assert name in wanted.state_dict(), "nobody fills it"
        assert torch.equal(buffer, wanted.state_dict()[name])
    assert torch.equal(criterion(pred, target), wanted(pred, target))


def test_signature_is_that_of_the_options():
    parameters = list(inspect.signature(FusedSeqLoss.__init__).parameters.values())[1:]
    fields = [field for field in dataclasses.fields(LossOptions) if field.init]
    assert [(p.name, p.default) for p in parameters] == [(f.name, f.default) for f in fields]
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_monitoring_changes_no_gradient(backend):
    pred, target = make_rows(33, 7)
    plain = FusedSeqLoss(backend=backend)
    watching = FusedSeqLoss(backend=backend, monitor=("infonce", "cosine"))
    loss, grad = gradient(plain, pred, target)
    got_loss, got_grad = gradient(watching, pred, target)
    assert torch.equal(got_loss, loss)
    assert torch.equal(got_grad, grad)
    wanted = truth(pred, target, **TERMS["infonce"]).loss.item()
    assert watching.stats.value["infonce"].item() == pytest.approx(wanted, rel=1e-6)


def test_inference_mode():
    pred, target = make_rows(33, 7)
    criterion = FusedSeqLoss(backend="cpu", **ALL)
    wanted = criterion(pred, target)
    with torch.inference_mode():
        got = criterion(pred, target)
        inside = criterion(pred.clone().requires_grad_(), target.clone())
        with torch.enable_grad():  # of no effect there on what PyTorch computes
            enabled = criterion(pred.clone().requires_grad_(), target.clone())
    assert torch.equal(got, wanted)
    assert torch.equal(inside, wanted)
    assert torch.equal(enabled, wanted)
    assert not enabled.requires_grad
    assert criterion.stats.grad_norm == {}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_first_called_on_a_device_in_inference_mode(backend):
    """What is kept for that device then must do for training too."""
    pred, target = make_rows(33, 7)
    criterion = FusedSeqLoss(backend=backend, **ALL).to("meta")
    with torch.inference_mode():
        criterion(pred, target)
    loss, grad = gradient(criterion, pred, target)
    wanted_loss, wanted_grad = gradient(FusedSeqLoss(backend=backend, **ALL), pred, target)
    assert torch.equal(loss, wanted_loss)
    assert torch.equal(grad, wanted_grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weighting", ["fixed", "gradient", "value"])
def test_no_call_makes_a_tensor_of_numbers(weighting, dtype, monkeypatch):
    """On a CUDA device that is a copy from the host, which waits and can't be captured."""
    pred, target = make_rows(33, 7, dtype=dtype)
    criterion = FusedSeqLoss(infonce=0.5, weighting=weighting, backend="cpu")
    with monkeypatch.context() as patched:
        patched.setattr(torch, "tensor", None)
        criterion(pred, target)
    assert criterion.stats.weights.dtype is dtype


def test_repr_shows_what_was_chosen():
    assert "infonce=0.5, temperature=0.1" in repr(FusedSeqLoss(infonce=0.5, temperature=0.1))
    assert "mse" not in repr(FusedSeqLoss())


def test_transforms_and_forward_mode_go_to_the_reference():
    pred, target = make_rows(9, 4, dtype=torch.float64)
    tangent = torch.ones_like(pred)

    def loss(x, backend=None):
        return FusedSeqLoss(**ALL, backend=backend)(x, target)

    with pytest.raises(ValueError, match=r"backend='cpu' can't serve this call: torch\.func"):
        torch.func.grad(lambda x: loss(x, "cpu"))(pred)
    leaf = pred.clone().requires_grad_()
    (true,) = torch.autograd.grad(loss(leaf, "reference"), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(pred), true)
    torch.testing.assert_close(torch.func.jvp(loss, (pred,), (tangent,))[1], (true * tangent).sum())
    with torch.autograd.forward_ad.dual_level():
        dual = loss(torch.autograd.forward_ad.make_dual(pred, tangent))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, (true * tangent).sum())


def test_a_state_cannot_follow_a_vmap():
    pred, target = make_rows(3, 9, 4, dtype=torch.float64)

    def losses(weighting):
        return torch.func.vmap(lambda p, t: functional.seq_loss(p, t, infonce=1.0, weighting=weighting)[0])(
            pred, target
        )

    wanted = [functional.seq_loss(p, t, infonce=1.0, weighting="fixed")[0] for p, t in zip(pred, target, strict=True)]
    torch.testing.assert_close(losses("fixed"), torch.stack(wanted))
    for weighting in ("gradient", "value", ones):
        with pytest.raises(ValueError, match=r"weighting must be 'fixed' under torch\.func\.vmap, got"):
            losses(weighting)


@pytest.mark.parametrize("weighting", ["gradient", "value"])
def test_balanced_weights_under_a_transform(weighting):
    pred, target = make_rows(9, 4, dtype=torch.float64)
    criterion, twin = (FusedSeqLoss(mse=0.5, infonce=0.5, weighting=weighting) for _ in range(2))
    leaf = pred.clone().requires_grad_()
    criterion(leaf, target).backward()
    torch.testing.assert_close(torch.func.grad(twin)(pred, target), leaf.grad)
    torch.testing.assert_close(twin.weighting.mean, criterion.weighting.mean)


def test_default_dtype_changes_nothing():
    pred, target = make_rows(9, 4)
    true = FusedSeqLoss(mse=0.5, infonce=0.5)(pred.clone().requires_grad_(), target)
    try:
        for dtype in (torch.float64, torch.bfloat16):
            torch.set_default_dtype(dtype)
            assert torch.equal(FusedSeqLoss(mse=0.5, infonce=0.5)(pred.clone().requires_grad_(), target), true)
    finally:
        torch.set_default_dtype(torch.float32)
