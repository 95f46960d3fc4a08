"""All errors, by the language of the file that they are in."""

from pathlib import Path
from typing import NamedTuple

from . import cpu, cuda, orchestration, triton
from .mutation import Mutation

ROOT = Path(__file__).parents[2]


class Language(NamedTuple):
    """Files of one kind, and the errors in them."""

    folder: str
    layers: tuple[str, ...]
    """Those that look at values here."""
    mutations: tuple[Mutation, ...]

    def path(self, mutation: Mutation) -> str:
        """Of the file with the error, from the root."""
        return f"{self.folder}/{mutation.file}"

    def layers_of(self, mutation: Mutation) -> tuple[str, ...]:
        """Those that can notice the error; where it changes no value they all run, and show that only one can."""
        return (*self.layers, "kernels-check") if mutation.compiled else self.layers


LANGUAGES = {
    "cuda": Language("csrc/cuda", ("simt", "simt-asan", "simt-tsan"), cuda.MUTATIONS),
    "triton": Language("amn_kernels/triton", ("ttsem",), triton.MUTATIONS),
    "cpu": Language("csrc", ("cpu tests",), cpu.MUTATIONS),
    "orchestration": Language("amn_kernels", ("cpu tests", "ttsem"), orchestration.MUTATIONS),
}
