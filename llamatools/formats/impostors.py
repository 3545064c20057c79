"""What people commonly have where a model should be: files that a download left behind."""

from __future__ import annotations

import re

from ..errors import FormatError

# What a server answers instead of a file; XML is how object stores word their errors.
WEB_PAGE = re.compile(rb"(?:\xef\xbb\xbf)?\s*<(?:!doctype html|html|head|\?xml)\b", re.IGNORECASE)

# https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md: the version first, the other keys sorted.
LFS_POINTER = re.compile(rb"version https://git-lfs\.github\.com/spec/v\d+\n")
LFS_SIZE = re.compile(rb"^size (\d{1,20})$", re.MULTILINE)

IMPOSTORS = frozenset({"empty", "web-page", "lfs-pointer", "zero-header"})  # codes of the errors below


def refuse_impostor(head: bytes, size: int) -> None:
    """Raises FormatError for an empty file, a web page, a git-lfs pointer, or a file that begins with zeros.

    head: the file's first bytes, up to 512. size: the file's, in bytes. Any other file passes.
    """
    if not size:
        raise FormatError("the file is empty", todo="Download it again", code="empty")
    if WEB_PAGE.match(head):
        raise FormatError(
            f"a web page of {size} bytes, not a model",
            todo="The download met a login or error page; download it again with access to it",
            code="web-page",
        )
    if LFS_POINTER.match(head):
        promised = LFS_SIZE.search(head)
        account = f"of {int(promised[1])} bytes" if promised else "of a size it does not state"
        raise FormatError(
            f"a git-lfs pointer of {size} bytes that stands for a file {account}",
            todo="Fetch the file itself with `git lfs pull`",
            code="lfs-pointer",
        )
    if head and not any(head):
        raise FormatError(
            f"its first {len(head)} bytes are zeros, as an interrupted write leaves them",
            todo="Copy or download it again",
            code="zero-header",
        )
