"""Textual MNIST (RIGSA, section 4.2): images of digits as text, the chat prompts around them, and the splits.

A pixel becomes one digit 0-9 and a row one line. The user's turn is the image, the assistant's turn is prefilled with
``The digit is `` and exactly one token follows.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from rigsa.errors import RigsaError
from rigsa.experiments.tasks.special_tokens import refuse_special_tokens
from rigsa.files import require_regular

ANSWER_PREFIX = "The digit is "
SPLIT_SEED = 0
"""Splits do not depend on the run's seed, so that every run is tested on the same images."""
VALIDATION_SHARE = 0.01
HELD_OUT_SHARE = 1 / 6
"""Test share where a source has no split of its own: MNIST's 10,000 of 60,000."""
MAX_SIDE = 64
LARGEST_IDX = 2**30
"""Values, a byte each, in one file: 20 times MNIST."""


@dataclass(frozen=True)
class Images:
    """`levels`: uint8 ``[n, height, width]`` in 0..9; `labels`: int64 ``[n]`` in 0..9."""

    levels: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, which: Any) -> Images:
        return Images(self.levels[which], self.labels[which])

    def first(self, count: int) -> Images:
        """The first `count` images; all for 0."""
        return self.take(slice(count or None))


@dataclass(frozen=True)
class Splits:
    train: Images
    validation: Images
    test: Images


def quantise(pixels: np.ndarray, maximum: int) -> np.ndarray:
    """Grey values 0..maximum to 0..9, in ten equal steps."""
    return (pixels.astype(np.int64) * 10 // (maximum + 1)).astype(np.uint8)


def image_text(levels: np.ndarray) -> str:
    """One digit a pixel, one line a row."""
    return "\n".join("".join(map(str, row)) for row in levels.tolist())


def make_images(pixels: np.ndarray, labels: np.ndarray, maximum: int, source: str) -> Images:
    """Check a source's arrays and quantise them. Raises RigsaError for a wrong shape or label."""
    if pixels.ndim != 3 or not 1 <= pixels.shape[1] <= MAX_SIDE or not 1 <= pixels.shape[2] <= MAX_SIDE:
        raise RigsaError(
            f"--data {source}: expected grey images [n, height, width] of at most {MAX_SIDE}x{MAX_SIDE} pixels, "
            f"got shape {list(pixels.shape)}"
        )
    if labels.shape != pixels.shape[:1]:
        raise RigsaError(f"--data {source}: {len(pixels)} images but labels of shape {list(labels.shape)}")
    if len(labels) and not (labels.min() >= 0 and labels.max() <= 9):
        raise RigsaError(f"--data {source}: expected labels 0 to 9, got {labels.min()} to {labels.max()}")
    return Images(quantise(pixels, maximum), labels.astype(np.int64))


def load_splits(source: str) -> Splits:
    """Training, validation and test images.

    Args:
        source: ``digits`` (scikit-learn's 1,797 digits of 8x8 pixels), ``mnist`` (the hub's ``ylecun/mnist``) or a
            folder of IDX files, gzipped or not: ``train-*`` and ``t10k-*``, or one of the pairs alone, of which a sixth
            is then held out as the test set, as it is of the digits. 1 % of the training images are for validation.

    Raises:
        RigsaError: the source is not there, or its images or labels are not what they should be.
    """
    if source == "digits":
        train, test = _hold_out(_load_digits())
    elif source == "mnist":
        train, test = _load_hub()
    else:
        train, test = _load_folder(Path(source))
    _check_splits(train, test, source)
    order = np.random.default_rng(SPLIT_SEED).permutation(len(train))
    num_validation = max(1, round(VALIDATION_SHARE * len(train)))
    return Splits(train.take(order[num_validation:]), train.take(order[:num_validation]), test)


def _check_splits(train: Images, test: Images, source: str) -> None:
    if len(train) < 2 or len(test) < 1:
        raise RigsaError(
            f"--data {source}: expected 2 training images or more, of which one is for validation, and a test image or "
            f"more; got {len(train)} and {len(test)}"
        )
    sizes = [f"{images.levels.shape[1]}x{images.levels.shape[2]}" for images in (train, test)]
    if sizes[0] != sizes[1]:
        raise RigsaError(
            f"--data {source}: expected images of one size, got {sizes[0]} to train and {sizes[1]} to test"
        )


def _hold_out(images: Images) -> tuple[Images, Images]:
    order = np.random.default_rng(SPLIT_SEED).permutation(len(images))
    num_test = round(HELD_OUT_SHARE * len(images))
    return images.take(order[num_test:]), images.take(order[:num_test])


def _load_digits() -> Images:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return make_images(digits.images, digits.target, 16, "digits")


def _load_hub() -> tuple[Images, Images]:
    import datasets

    try:
        mnist = datasets.load_dataset("ylecun/mnist")
    except Exception as error:  # the hub's client raises a dozen unrelated types
        raise RigsaError(
            f"--data mnist: ylecun/mnist is neither cached nor to be had from the hub ({type(error).__name__}). Use "
            "--data digits, which needs no network, or a folder with MNIST's IDX files."
        ) from error
    train, test = (
        make_images(
            np.stack([np.asarray(image) for image in mnist[split]["image"]]),
            np.asarray(mnist[split]["label"]),
            255,
            "mnist",
        )
        for split in ("train", "test")
    )
    return train, test


def _load_folder(folder: Path) -> tuple[Images, Images]:
    if not folder.is_dir():
        raise RigsaError(f"--data {folder}: not a folder. Expected digits, mnist, or a folder of IDX files.")
    pairs = {split: _read_pair(folder, split) for split in ("train", "t10k")}
    train, test = pairs["train"], pairs["t10k"]
    if train is not None and test is not None:
        return train, test
    only = train or test
    if only is None:
        raise RigsaError(
            f"--data {folder}: no IDX files. Expected train-images-idx3-ubyte and train-labels-idx1-ubyte, or "
            "t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte, each with or without .gz."
        )
    return _hold_out(only)


def _read_pair(folder: Path, split: str) -> Images | None:
    found = [
        next((path for path in (folder / name, folder / f"{name}.gz") if path.exists()), None)
        for name in (f"{split}-images-idx3-ubyte", f"{split}-labels-idx1-ubyte")
    ]
    images, labels = found
    if images is None and labels is None:
        return None
    if images is None or labels is None:
        raise RigsaError(f"--data {folder}: the {split} {'images' if images is None else 'labels'} are missing")
    return make_images(read_idx(images), read_idx(labels), 255, str(folder))


def read_idx(path: Path) -> np.ndarray:
    """An IDX file of unsigned bytes (LeCun's format: two zeros, type 8, rank, big-endian sizes, data), gzipped or not.

    No more is read than the file announces, so a small file that unpacks to a huge one takes no memory.

    Raises:
        RigsaError: the file is not that, is cut short or goes on after its last value, or announces over 1 GiB.
    """
    require_regular(path)
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            shape = _idx_shape(file.read(4), file.read, path)
            size = math.prod(shape)
            if size > LARGEST_IDX:
                raise RigsaError(f"--data: {path} announces {shape} values; expected at most {LARGEST_IDX}")
            data = file.read(size + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise RigsaError(f"--data: cannot read {path}: {error}") from error
    if len(data) != size:
        held = "more" if len(data) > size else len(data)
        raise RigsaError(f"--data: {path} announces {shape} values and holds {held}; it is cut short or damaged")
    return np.frombuffer(data, np.uint8).reshape(shape)


def _idx_shape(magic: bytes, read: Callable[[int], bytes], path: Path) -> tuple[int, ...]:
    if len(magic) < 4 or magic[:3] != b"\x00\x00\x08":
        raise RigsaError(f"--data: {path} is not an IDX file of unsigned bytes")
    sizes = read(4 * magic[3])
    if len(sizes) < 4 * magic[3]:
        raise RigsaError(f"--data: {path} ends within its header; it is cut short or damaged")
    return tuple(int(size) for size in np.frombuffer(sizes, ">u4"))


class Prompts:
    """Token ids of the chat prompts, for one tokenizer.

    Args:
        tokenizer: of `transformers`, with a chat template, in which each digit after the prefilled answer is one token.
        system_prompt: of the chat; ``default`` leaves it to the template.

    Raises:
        RigsaError: the tokenizer does not fit.
    """

    def __init__(self, tokenizer: Any, system_prompt: str = "default") -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise RigsaError("--model: its tokenizer has no chat template; Textual MNIST needs an instruct model")
        self.tokenizer = tokenizer
        refuse_special_tokens(tokenizer, system_prompt, "--system-prompt")
        self.system = [] if system_prompt == "default" else [{"role": "system", "content": system_prompt}]
        self.digit_ids = torch.tensor([self._digit_id(digit) for digit in range(10)])
        self.pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def fingerprint(self) -> str:
        """A short hash of the vocabulary and the chat template: equal for prompts with equal ids."""
        vocabulary = sorted(self.tokenizer.get_vocab().items())
        return hashlib.sha256(json.dumps([vocabulary, self.tokenizer.chat_template]).encode()).hexdigest()[:16]

    def _digit_id(self, digit: int) -> int:
        prefix = self._encode(ANSWER_PREFIX)
        answered = self._encode(f"{ANSWER_PREFIX}{digit}")
        if len(answered) != len(prefix) + 1 or answered[:-1] != prefix:
            raise RigsaError(
                f"--model: its tokenizer does not make the digit {digit} after {ANSWER_PREFIX!r} one token of its own "
                f"(got {self.tokenizer.convert_ids_to_tokens(answered)}); Textual MNIST needs that"
            )
        return answered[-1]

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def text(self, levels: np.ndarray, examples: Images | None = None) -> str:
        """The prompt for one image, after `examples` as earlier turns."""
        turns = list(self.system)
        for shown, label in zip(examples.levels, examples.labels, strict=True) if examples else ():
            turns.append({"role": "user", "content": image_text(shown)})
            turns.append({"role": "assistant", "content": f"{ANSWER_PREFIX}{label}"})
        turns.append({"role": "user", "content": image_text(levels)})
        return self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) + ANSWER_PREFIX

    def encode(self, levels: np.ndarray, examples: Images | None = None) -> list[int]:
        return self._encode(self.text(levels, examples))


class PromptDataset(Dataset[dict[str, Any]]):
    """Prompts and answer tokens of `images`: ``{"input_ids": list of ids, "answer": token id}``."""

    def __init__(self, images: Images, prompts: Prompts, examples: Images | None = None) -> None:
        self.images, self.prompts, self.examples = images, prompts, examples

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = self.prompts.encode(self.images.levels[index], self.examples)
        return {"input_ids": ids, "answer": int(self.prompts.digit_ids[self.images.labels[index]])}


def positions(mask: Tensor) -> Tensor:
    """int64 ``[B, T]``: each token's place in its own prompt, from a mask that is 0 where a row is padded on the left.

    A model with learned positions would else read a prompt as one that begins in the middle.
    """
    return (mask.cumsum(-1) - 1).clamp(min=0)


def collate(samples: Sequence[dict[str, Any]], pad_id: int) -> dict[str, Tensor]:
    """``input_ids [B, T]`` and ``answer [B]``, padded on the left so that the answer is always the next token.

    Prompts of one image size have one length, and then there is no ``attention_mask`` to pay for.
    """
    width = max(len(sample["input_ids"]) for sample in samples)
    padding = [width - len(sample["input_ids"]) for sample in samples]
    rows = [[pad_id] * missing + sample["input_ids"] for missing, sample in zip(padding, samples, strict=True)]
    batch = {"input_ids": torch.tensor(rows), "answer": torch.tensor([sample["answer"] for sample in samples])}
    if any(padding):
        batch["attention_mask"] = (torch.arange(width) >= torch.tensor(padding)[:, None]).long()
    return batch
