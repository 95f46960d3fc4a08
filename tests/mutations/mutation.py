"""What an error is."""

from typing import NamedTuple


class Mutation(NamedTuple):
    """An error: `old`, which the file has so many `times`, becomes `new`."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...] = ()
    """Of tests/, as file::function[case]: on the CPU, which has no GPU kernels."""
    ttsem: tuple[str, ...] = ()
    """The same of those that launch Triton kernels."""
    compiled: tuple[str, ...] = ()
    """Of an error that changes no value, what is compiled for GPUs to see it: CUDA sources, or "triton"."""
    times: int = 1

    def put_into(self, text: str) -> str:
        """The file with the error; ValueError if the file is no longer what the error was written for."""
        if (count := text.count(self.old)) != self.times:
            raise ValueError(f"{self.name}: {self.file} has {self.old!r} {count} times, not {self.times}")
        return text.replace(self.old, self.new)
