"""Fused MSE + cosine + InfoNCE losses for models that predict embedding vectors.

>>> from amn_kernels import FusedSeqLoss
>>> criterion = FusedSeqLoss(mse=1.0, infonce=0.5)
>>> loss = criterion(pred, target)
"""

__version__ = "0.1.0"

from amn_kernels import functional
from amn_kernels.audit import audit
from amn_kernels.module import FusedSeqLoss
from amn_kernels.queue import NegativeQueue
from amn_kernels.stats import LossStats

__all__ = ["FusedSeqLoss", "LossStats", "NegativeQueue", "__version__", "audit", "functional"]
