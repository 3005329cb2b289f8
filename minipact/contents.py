"""What a file is by its first bytes, where that is not what its name says."""

from __future__ import annotations

import re
from pathlib import Path

_MARKS = (  # first bytes, what such a file is, and the way on
    (rb"version https://git-lfs", "a pointer of Git LFS, not the file itself: run git lfs pull there"),
    (rb"\s*<(!doctype|html|\?xml)", "a web page, not the file itself: fetch it again, signed in if need be"),
    (rb"GGUF", "a GGUF file of llama.cpp: give the model that it was made from"),
    (rb"\x89HDF", "an HDF5 file, as Keras writes it: save the model with PyTorch and give that"),
)  # fmt: skip


def strange_content(file: Path) -> str:
    """What a checkpoint file is and the way on, where its content is of another kind than its name says.

    Empty where nothing shows.
    """
    try:
        with file.open("rb") as opened:
            head = opened.read(64)
    except OSError:  # told by who reads it
        return ""
    named = file.suffix == ".safetensors"
    if not head and not named:
        return "is empty: copy or download it again"
    for pattern, what in _MARKS:
        if re.match(pattern, head, re.IGNORECASE):
            return f"is {what}"
    # a header of 640 bytes begins as a pickle does
    if named and re.match(rb"PK\x03\x04|\x80[\x02-\x05]", head) and head[8:9] != b"{":
        return "is a file of torch.save by its content: end its name in .pt"
    room = file.stat().st_size - 8
    if not named and head[8:10] == b'{"' and int.from_bytes(head[:8], "little") <= room:
        return "is a safetensors file by its content: end its name in .safetensors"
    return ""
