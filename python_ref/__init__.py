"""Plain PyTorch twin of the kernels: the readable definition, the fallback backend and the truth of the tests."""

from amn_kernels.reference.seq_loss import term_outputs

__all__ = ["term_outputs"]
