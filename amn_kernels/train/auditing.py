"""The audit of a model and loss named by options, on the training windows of their data."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from amn_kernels.audit import AuditReport, audit
from amn_kernels.data import load_windows, split_windows
from amn_kernels.train.config import LossConfig
from amn_kernels.train.training import make_batches


@dataclass(frozen=True)
class AuditConfig(LossConfig):
    """Options of `amn-kernels audit`; the texts under the fields are its help."""

    probe_steps: int = 20
    """Training steps, on a copy of the model, between the two measurements; 0 measures the start alone."""
    json: Path | None = None
    """Also write the figures to this file."""
    strict: bool = False
    """Exit with 1 if a term drowns another: pulls more than 10 times as hard, and 10 times harder than asked."""


def audit_config(config: LossConfig, probe_steps: int) -> AuditReport:
    """Audits model and loss as `train` with the same options would start them; ValueError for bad data or options."""
    torch.manual_seed(config.seed)
    windows = load_windows(config.data, config.context)
    rows = np.random.default_rng(config.seed).permutation(split_windows(windows).train)
    loader = (windows.batch(batch) for batch in make_batches(rows, config.batch_size))
    return audit(config.make_model(windows.dim), loader, config.make_criterion(), probe_steps=probe_steps)
