"""The examples: each runs and learns, is short, and says the truth about accumulation, graphs and contracts."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from error_rule import make_rows
from host_reads import NoHostReads
from torch import nn

from amn_kernels import FusedSeqLoss, NegativeQueue
from amn_kernels.weighting import BalancedWeighting

EXAMPLES = Path(__file__).parent.parent / "examples"
NEEDS = {
    "huggingface_trainer": "transformers",
    "lightning_module": "lightning",
    "accelerate_loop": "accelerate",
    "sentence_transformers_loss": "sentence_transformers",
    "torchjd_weighting": "torchjd",
}
"""Example: what it needs besides torch."""

pytestmark = pytest.mark.skipif(not EXAMPLES.exists(), reason="runs in a checkout only")


@pytest.fixture
def _deterministic():
    """Memory that nobody fills is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def load(name):
    """The names an example defines, without running it."""
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    return runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name=name)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_runs_and_learns(path, tmp_path):
    if path.stem in NEEDS:
        pytest.importorskip(NEEDS[path.stem])
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if "ddp" in path.stem else []
    process = subprocess.run(
        [sys.executable, *ranks, path],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-5000:]
    if path.stem == "cuda_graph" and not torch.cuda.is_available():
        assert process.stdout.startswith("skipped: a CUDA graph needs a CUDA GPU")
        pytest.skip("a CUDA graph needs a GPU; its step is tested for reads on the host")
    before, after = map(float, re.search(r"cosine (\S+) before, (\S+) after", process.stdout).groups())
    assert after > before + 0.1


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_is_at_most_60_lines(path):
    assert len(path.read_text().splitlines()) <= 60


def trained(rows, batch, accumulation, folder, **options):
    """Weights after one epoch of SGD by Trainer on `rows` windows, in micro-batches of `batch`."""
    from transformers import Trainer, TrainingArguments

    example = load("huggingface_trainer")
    torch.manual_seed(1)
    model = example["Predictor"](**options)
    data = example["Vectors"](torch.randn(rows, 5, 384), torch.randn(rows, 384))
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, num_train_epochs=1,
        optim="sgd", learning_rate=1.0, max_grad_norm=1e9, lr_scheduler_type="constant", save_strategy="no",
        remove_unused_columns=False, report_to=[], disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    before = model.layers[1].weight.detach().clone()
    Trainer(model, arguments, train_dataset=data, compute_loss_func=model.loss).train()
    return model.layers[1].weight.detach() - before


def test_trainer_with_accumulation_equals_the_big_batch_where_rows_do_not_meet(tmp_path):
    """96 rows as one batch and as uneven micro-batches of 64 and 32."""
    options = {"mse": 0.5, "cosine": 0.5, "weighting": "fixed"}
    whole, parts = trained(96, 96, 1, tmp_path, **options), trained(96, 64, 2, tmp_path, **options)
    assert whole.norm() > 0.01
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-7)


def test_trainer_with_accumulation_has_the_negatives_of_the_micro_batch(tmp_path):
    """As the docstring says: infonce is another loss with fewer negatives, and not wrongly scaled."""
    options = {"mse": 0.0, "infonce": 1.0, "weighting": "fixed"}
    whole, parts = trained(96, 96, 1, tmp_path, **options), trained(96, 64, 2, tmp_path, **options)
    assert not torch.allclose(parts, whole, rtol=1e-2)
    assert 0.9 < parts.norm() / whole.norm() < 1.1


@pytest.mark.usefixtures("_deterministic")
def test_a_loss_in_a_pretrained_model_whose_checkpoint_has_none(tmp_path):
    """With the lines of docs/integrations.md; without them transformers leaves the loss what memory held."""
    transformers = pytest.importorskip("transformers", reason="transformers, of the extra examples, is not installed")
    page = (EXAMPLES.parent / "docs" / "integrations.md").read_text()
    lines = re.search(r"```python\n(def _init_weights.*?)```", page, flags=re.S).group(1)
    names = {"FusedSeqLoss": FusedSeqLoss, "BalancedWeighting": BalancedWeighting}
    exec(lines.replace("super()", "super(type(self), self)"), names)

    class Plain(transformers.PreTrainedModel):
        config_class = transformers.PretrainedConfig

        def __init__(self, config):
            super().__init__(config)
            self.layer = nn.Linear(8, 8)
            self.post_init()

    class WithLoss(Plain):
        _init_weights = names["_init_weights"]

        def __init__(self, config):
            super().__init__(config)
            self.criterion = FusedSeqLoss(infonce=0.5, learnable_temperature=True)
            self.queue = NegativeQueue(16, 8)
            self.post_init()

    Plain(transformers.PretrainedConfig()).save_pretrained(tmp_path / "plain")
    model = WithLoss.from_pretrained(tmp_path / "plain")
    fresh = FusedSeqLoss(infonce=0.5, learnable_temperature=True).state_dict()
    assert all(torch.equal(x, fresh[name]) for name, x in model.criterion.state_dict().items())

    pred, target = make_rows(16, 8)
    model.criterion(pred.requires_grad_(), target)
    model.queue.push(target)
    model.save_pretrained(tmp_path / "whole")
    again = WithLoss.from_pretrained(tmp_path / "whole")
    state = again.criterion.state_dict()
    assert all(torch.equal(x, state[name]) for name, x in model.criterion.state_dict().items())
    assert torch.equal(again.queue.negatives(), target)


def test_sentence_transformers_loss_is_mnrl_with_hard_negatives():
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    anchor, positive = make_rows(20, 8)
    negative = make_rows(20, 8, seed=3)[0]
    columns = [{"sentence_embedding": x} for x in (anchor, positive, negative)]
    fused = load("sentence_transformers_loss")["FusedLoss"](nn.Identity(), mse=0.0, infonce=1.0, temperature=0.05)
    wanted = losses.MultipleNegativesRankingLoss(nn.Identity(), scale=20.0)
    torch.testing.assert_close(fused(columns, None), wanted(columns, None), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_step_of_the_graph_reads_nothing_on_the_host(backend):
    """What can be said of it without a GPU: the operators of the step, on the CPU, contain no read of a value.

    Fake CUDA tensors would not do: without a GPU, recording a gradient of one ends the process.
    """
    context, target = torch.randn(64, 5, 16), torch.randn(64, 16)
    model = nn.Sequential(nn.Flatten(), nn.Linear(5 * 16, 16))
    criterion = FusedSeqLoss(mse=0.5, infonce=0.5, backend=backend)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = load("cuda_graph")["make_step"](model, criterion, optimizer, context, target)
    with NoHostReads():
        first, second = step(), step()
    assert second < first
    with pytest.raises(AssertionError, match="waits for the device"), NoHostReads():
        second.item()  # which does wait
