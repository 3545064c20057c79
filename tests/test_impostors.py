"""Files that a download left where a model should be."""

from __future__ import annotations

import pytest

from llamatools.errors import FormatError
from llamatools.formats.impostors import refuse_impostor

# The example of git-lfs's own specification (docs/spec.md of github.com/git-lfs/git-lfs).
POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\n"
    b"size 12345\n"
)


def refusal(data: bytes) -> str:
    with pytest.raises(FormatError) as error:
        refuse_impostor(data[:512], len(data))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_empty_file() -> None:
    assert refusal(b"") == "the file is empty. Download it again"


@pytest.mark.parametrize(
    "page",
    [
        b"<!DOCTYPE html><html><head><title>Sign in</title>",
        b"\n  <html lang='en'>",
        b"\xef\xbb\xbf<!doctype HTML>",
        b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>",
        b"<head>",
    ],
)
def test_web_page(page: bytes) -> None:
    assert refusal(page) == (
        f"a web page of {len(page)} bytes, not a model. "
        "The download met a login or error page; download it again with access to it"
    )


def test_git_lfs_pointer() -> None:
    assert refusal(POINTER) == (
        f"a git-lfs pointer of {len(POINTER)} bytes that stands for a file of 12345 bytes. "
        "Fetch the file itself with `git lfs pull`"
    )
    assert "stands for a file of a size it does not state" in refusal(POINTER[:60])


def test_zeros_of_an_interrupted_write() -> None:
    assert refusal(bytes(4096)) == (
        "its first 512 bytes are zeros, as an interrupted write leaves them. Copy or download it again"
    )
    assert "its first 3 bytes are zeros" in refusal(bytes(3))


@pytest.mark.parametrize(
    "head", [b"PK\x03\x04", b"GGUF\x03\x00\x00\x00", b"\x00\x01", b"<htmlx", b"version https://x\n"]
)
def test_anything_else_passes(head: bytes) -> None:
    refuse_impostor(head, 1 << 40)
