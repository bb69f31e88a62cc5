"""CLIP's tokenizer in the files of the ``tokenizers`` and ``transformers`` libraries."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import transformers

from vlkr.files import write_text
from vlkr.models.clip import ClipBundle, clip_bpe, save_tokenizer

_hf: Any = transformers  # whose types differ from version to version
_NAMES = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}


def clip_tokenizer(bundle: ClipBundle) -> Any:
    """The tokenizer of transformers with the same ids as open_clip's.

    Texts are not mended first (mojibake, HTML entities), which open_clip does with ftfy.

    Raises:
        VlkrError: if the model has another tokenizer than CLIP's own.
    """
    vocabulary, merges = clip_bpe(bundle)
    ids = {_NAMES.get(token, token): index for token, index in vocabulary.items()}
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
    with TemporaryDirectory() as folder:
        Path(folder, "vocab.json").write_text(json.dumps(ids), encoding="utf-8")
        Path(folder, "merges.txt").write_text("\n".join(lines), encoding="utf-8")
        return _hf.CLIPTokenizerFast.from_pretrained(
            folder, model_max_length=context_length(bundle)
        )


def context_length(bundle: ClipBundle) -> int:
    """Tokens a text."""
    return int(bundle.tokenizer([""]).shape[1])


def write_tokenizer(bundle: ClipBundle, folder: Path) -> None:
    """Writes the tokenizer's own files, or CLIP's as ``tokenizer.json``.

    The latter gives ids that are cut and filled up as open_clip's are.

    Raises:
        VlkrError: for a tokenizer that cannot be written.
    """
    if save_tokenizer(bundle, folder):
        return
    tokenizer = clip_tokenizer(bundle).backend_tokenizer
    length = context_length(bundle)
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length, pad_id=0, pad_token="!")
    write_text(folder / "tokenizer.json", tokenizer.to_str())
