"""What a finding is, and the table of all that there are. What each means stands in docs/reference/findings.md."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..errors import LlamatoolsError, printable

Severity = Literal["error", "warning", "note"]

# An error keeps llamatools or llama.cpp from using the file, or means that it does not hold what it should.
SEVERITIES: dict[str, Severity] = {
    # the file as a whole
    "empty": "error",
    "web-page": "error",
    "lfs-pointer": "error",
    "zero-header": "error",
    "zero-tail": "error",
    "zero-end": "warning",
    "damaged": "error",
    "truncated": "error",
    # sets of files
    "shard-missing": "error",
    "shard-name": "error",
    "shard-alien": "error",
    # where tensors lie
    "alignment-value": "error",
    "alignment-mismatch": "error",
    "misaligned": "error",
    "not-in-place": "warning",
    "padding": "error",
    "hole": "error",
    "overlap": "error",
    "order": "error",
    "unplaced": "error",
    "trailing": "warning",
    "unpadded": "note",
    # names and keys
    "tensor-name": "error",
    "tensor-twice": "error",
    "key-name": "error",
    "key-twice": "error",
    "key-type": "error",
    "key-missing": "error",
    "hostile-name": "warning",
    # what the model is
    "dtype": "error",
    "shape": "error",
    "hparams": "error",
    "shape-mismatch": "error",
    "tensor-missing": "error",
    "tensor-unknown": "warning",
    "vocabulary": "error",
    "special-id": "error",
    # the data, read by `scan`
    "nan": "error",
    "infinite": "error",
    "zero-tensor": "warning",
    "huge": "warning",
    "not-scanned": "note",
    # the data, held against digests stored in the file, or against what it was made from
    "digest": "error",
    "digest-stale": "note",
    "digest-lost": "warning",
    "unlike-source": "error",
    "not-in-source": "error",
    "not-in-file": "error",
    "unproven": "error",
}


@dataclass(frozen=True)
class Finding:
    """Something about a file that its user should know.

    code: its short name. what: the fact, with both numbers. file: the path. where: the tensor or key.
    span: the bytes of the file that it concerns, first and after last. remedy: a sentence without its full stop.
    """

    code: str
    what: str
    file: str | None = None
    where: str | None = None
    span: tuple[int, int] | None = None
    remedy: str | None = None

    @property
    def severity(self) -> Severity:
        return SEVERITIES[self.code]

    def __str__(self) -> str:
        account = f"{self.where}: {self.what}" if self.where else self.what
        return printable(f"{account}. {self.remedy}" if self.remedy else account)


def of_error(error: LlamatoolsError) -> Finding:
    """What a reader told, as a finding."""
    return Finding(error.code, error.what, error.file, error.where, error.span, error.todo)
