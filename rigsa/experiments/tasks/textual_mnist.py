"""Textual MNIST (RIGSA, section 4.2): images of digits as text, the chat prompts around them, and the splits.

A pixel becomes one digit 0-9 and a row one line. The user's turn is the image, the assistant's turn is prefilled with
``The digit is `` and exactly one token follows. Where a tokenizer makes one token of a space and a digit, the answer
begins with the space.
"""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rigsa.errors import RigsaError
from rigsa.experiments.config import TEXT_FILES, Config
from rigsa.experiments.tasks.conversation import Conversation
from rigsa.experiments.tasks.task import Sample, Samples, Size, Task
from rigsa.files import naming, require_regular

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
        raise RigsaError(
            f"--data {folder}: not a folder. Expected digits, mnist, or a folder of IDX files; or texts, which are a "
            f"file that ends in {', '.join(TEXT_FILES)}, a folder of such files, or a data set on the hub (OWNER/NAME)"
        )
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
    with naming("--data"):
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


class Prompts(Conversation):
    """Token ids of the prompts with an image, for one tokenizer.

    Args:
        tokenizer: of `transformers`, in which each digit after the prefilled answer is one token.
        system_prompt: as in `Conversation`.

    Raises:
        RigsaError: the tokenizer does not fit.
    """

    def __init__(self, tokenizer: Any, system_prompt: str = "default") -> None:
        super().__init__(tokenizer, system_prompt)
        self.prefix = next(filter(self._answers_with_one_token, (ANSWER_PREFIX, ANSWER_PREFIX.rstrip())), None) or ""
        if not self.prefix:
            got = self.tokenizer.convert_ids_to_tokens(self.encode(f"{ANSWER_PREFIX}7"))
            raise RigsaError(
                f"--model: its tokenizer does not make each digit after {ANSWER_PREFIX!r} one token of its own (got "
                f"{got}); Textual MNIST needs that"
            )
        self.digit_ids = torch.tensor([self.encode(f"{ANSWER_PREFIX}{digit}")[-1] for digit in range(10)])

    def _answers_with_one_token(self, prefix: str) -> bool:
        """Whether one token more than those of `prefix` stands for each digit."""
        before = self.encode(prefix)
        after = [self.encode(f"{ANSWER_PREFIX}{digit}") for digit in range(10)]
        return all(len(ids) == len(before) + 1 and ids[:-1] == before for ids in after)

    def text(self, levels: np.ndarray, examples: Images | None = None) -> str:
        """The prompt for one image, after `examples` as earlier turns."""
        turns = []
        for shown, label in zip(examples.levels, examples.labels, strict=True) if examples else ():
            turns.append({"role": "user", "content": image_text(shown)})
            turns.append({"role": "assistant", "content": f"{ANSWER_PREFIX}{label}"})
        turns.append({"role": "user", "content": image_text(levels)})
        return self.render(turns, asks=True) + self.prefix

    def image_ids(self, levels: np.ndarray, examples: Images | None = None) -> list[int]:
        return self.encode(self.text(levels, examples))


class PromptDataset(Samples):
    """Prompts of `images`; the target is the answer's token, or every token from the second on.

    Args:
        images: of one split.
        prompts: their token ids.
        examples: images that stand before each one, as earlier turns.
        covers: ``answer`` or ``all``.
    """

    def __init__(
        self, images: Images, prompts: Prompts, examples: Images | None = None, covers: str = "answer"
    ) -> None:
        super().__init__(prompts.pad_id)
        self.images, self.prompts, self.examples, self.covers = images, prompts, examples, covers

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        ids = self.prompts.image_ids(self.images.levels[index], self.examples)
        answer = int(self.prompts.digit_ids[self.images.labels[index]])
        return {"input_ids": ids, "targets": [answer] if self.covers == "answer" else [*ids[1:], answer]}


class TextualMnist(Task):
    """Images of digits as a task.

    Args:
        config: `data` names the source; `train_examples` and `test_examples` are the most that are used of a split.

    Raises:
        RigsaError: as `load_splits`, or there are not enough images for the examples of a test prompt.
    """

    conversation: Prompts

    def __init__(self, config: Config) -> None:
        splits = load_splits(config.data)
        self.config = config
        self.splits = Splits(
            splits.train.first(config.train_examples), splits.validation, splits.test.first(config.test_examples)
        )
        if max(config.shots) > len(self.splits.train):
            raise RigsaError(
                f"--eval-shots: there are only {len(self.splits.train)} training images to show, got "
                f"{config.eval_shots}"
            )

    @property
    def num_training(self) -> int:
        return len(self.splits.train)

    def meet(self, tokenizer: Any, longest: int | None) -> None:
        self.conversation = Prompts(tokenizer, self.config.system_prompt)

    def describe(self) -> str:
        splits, (height, width) = self.splits, self.splits.train.levels.shape[1:]
        return (
            f"{self.config.data}: {len(splits.train):,} training, {len(splits.validation):,} validation and "
            f"{len(splits.test):,} test images of {height}x{width}; prompts of {self.size().tokens} tokens"
        )

    def training(self) -> PromptDataset:
        return PromptDataset(self.splits.train, self.conversation, covers=self.config.loss)

    def validation(self) -> PromptDataset:
        return PromptDataset(self.splits.validation, self.conversation, self.examples(self.config.shots[0]))

    def tests(self) -> dict[str, Samples]:
        return {
            f"{shots}-shot": PromptDataset(self.splits.test, self.conversation, self.examples(shots))
            for shots in self.config.shots
        }

    def examples(self, shots: int) -> Images | None:
        """The training images that stand as examples before every test image; None for no examples."""
        if shots == 0:
            return None
        order = np.random.default_rng(self.config.seed).permutation(len(self.splits.train))
        return self.splits.train.take(order[:shots])

    def size(self) -> Size:
        """That of the first image: a source has images of one size."""
        sample = self.training()[0]
        return Size(len(sample["input_ids"]), len(sample["targets"]))
