"""Texts of the user's own as a task: files, or a data set on the hub, in the formats that `formats.py` knows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rigsa.errors import RigsaError
from rigsa.experiments.config import TEXT_FILES, Config
from rigsa.experiments.measures import HELD_OUT, score_name
from rigsa.experiments.tasks.conversation import Conversation
from rigsa.experiments.tasks.encoding import Encoder, learned_from
from rigsa.experiments.tasks.formats import Example, read_examples, recognise_format
from rigsa.experiments.tasks.rows import Row, hub_rows, read_rows
from rigsa.experiments.tasks.task import Sample, Samples, Size, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SPLITS = ("train", "validation", "test")
NAMES = {"train": ("train", "training"), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}
"""What files and splits of the hub are called."""


class TextSamples(Samples):
    """Samples that are held in memory.

    Attributes:
        lengths: tokens of each.
    """

    def __init__(self, samples: Sequence[Sample], pad_id: int) -> None:
        super().__init__(pad_id)
        self.samples = samples
        self.lengths = [len(sample["input_ids"]) for sample in samples]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]


@dataclass(frozen=True)
class Left:
    """What of the examples was not used as it stands, in numbers."""

    cut: int = 0
    dropped: int = 0
    last_turn_only: int = 0

    def __str__(self) -> str:
        parts = {
            "{} cut at the longest length": self.cut,
            "{} left out, as the cut takes all of the answer": self.dropped,
            "{} learned in the last turn only, as the chat template rewrites earlier turns": self.last_turn_only,
        }
        return "; ".join(text.format(f"{number:,}") for text, number in parts.items() if number)


class TextTask(Task):
    """Texts as a task.

    Args:
        config: `data` names the source, `format` what its columns mean, `loss` what is learned.

    Raises:
        RigsaError: the data are missing or damaged, a row is no example, or a split is empty. File and line are named.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        found = _read_splits(config.data)
        named = config.format != "auto"
        self.format = config.format if named else recognise_format(found["train"], config.data)
        examples = {split: read_examples(rows, self.format) for split, rows in found.items()}
        self.splits, self.twice = _split(examples, config.validation_share, config.data)
        self.splits["train"] = self.splits["train"][: config.train_examples or None]
        self.splits["test"] = self.splits["test"][: config.test_examples or None]
        if config.score in ("exact", "choice", "number") and self.format == "text":
            raise RigsaError(f"--score {config.score}: plain texts have no answers to be scored; expected none")

    @property
    def num_training(self) -> int:
        return len(self.splits["train"])

    def meet(self, tokenizer: Any, longest: int | None) -> None:
        self.conversation = Conversation(tokenizer, self.config.system_prompt)
        limits = [limit for limit in (longest, self.config.max_length or None) if limit is not None]
        self.longest = longest
        self.encoder = Encoder(self.conversation, self.config.loss, min(limits, default=None))
        encoded = {split: [self.encoder.encode(one) for one in examples] for split, examples in self.splits.items()}
        everything = [one for split in encoded.values() for one in split]
        self.left = Left(
            cut=sum(one.cut > 0 and one.sample is not None for one in everything),
            dropped=sum(one.sample is None for one in everything),
            last_turn_only=sum(one.last_turn_only for one in everything),
        )
        pairs = {split: list(learned_from(encoded[split], self.splits[split])) for split in SPLITS}
        for split, kept in pairs.items():
            if not kept:
                raise RigsaError(
                    f"--max-length: nothing that is learned is left of the {len(encoded[split])} {split} examples when "
                    f"they are cut after {self.encoder.longest} tokens"
                )
        self.splits = {split: [example for example, _ in kept] for split, kept in pairs.items()}
        self.samples = {
            split: TextSamples([sample for _, sample in kept], self.conversation.pad_id)
            for split, kept in pairs.items()
        }

    def describe(self) -> str:
        counts = " and ".join(
            f"{len(self.splits[split]):,} {name}" for split, name in (("validation", "validation"), ("test", "test"))
        )
        learned = "all tokens" if self.config.loss == "all" or self.format == "text" else "the assistant's turns"
        lines = [
            f"{self.config.data} ({self.format}): {self.num_training:,} training, {counts} examples of "
            f"{min(self.training().lengths):,} to {max(self.training().lengths):,} tokens; "
            f"{learned} are learned"
        ]
        notes = [
            f"{self.twice:,} left out, as their prompt stands in another split, too" if self.twice else "",
            str(self.left),
            "the tokenizer has no chat template, so prompts are plain lines" if self.conversation.is_plain else "",
        ]
        return "; ".join([*lines, *filter(None, notes)])

    def training(self) -> TextSamples:
        return self.samples["train"]

    def validation(self) -> TextSamples:
        return self.samples["validation"]

    def tests(self) -> dict[str, Samples]:
        return {HELD_OUT: self.samples["test"]}

    @cached_property
    def _size(self) -> Size:
        samples = self.training()
        return Size(
            max(samples.lengths),
            max(len(sample["targets"]) for sample in samples.samples),
            padded=len(set(samples.lengths)) > 1,
            packed=self.config.packing,
        )

    def size(self) -> Size:
        return self._size

    def asked(self) -> dict[str, str]:
        return {
            example.turns[-2]["content"] if len(example.turns) > 1 else example.text: example.place
            for example in self.splits["train"]
        }

    def score(self, model: PreTrainedModel, batch_size: int, label: str) -> dict[str, dict[str, Any]]:
        from rigsa.experiments.tasks import source_tasks
        from rigsa.experiments.tasks.scoring import score_answers

        config, label = self.config, f"{label}: {score_name(self.config.score)}"
        if config.score == "none":
            return {}
        if config.score.startswith("lm-eval:"):
            return {config.score: source_tasks.score(model, self.conversation, config, label)}
        examples = self.splits["test"]
        return {
            config.score: score_answers(
                model,
                self.conversation,
                [self.encoder.prompt(example) for example in examples],
                [example.answer for example in examples],
                config.score,
                max_new_tokens=config.answer_tokens,
                longest=self.longest,
                batch_size=batch_size,
                label=label,
            )
        }


def format_of(source: str) -> str:
    """The format of the data of that name. Raises RigsaError as `TextTask`."""
    return recognise_format(_read_splits(source)["train"], source)


def _read_splits(source: str) -> dict[str, list[Row]]:
    """The rows of each split that the source has: the training split, and perhaps the others."""
    path = Path(source)
    if path.is_dir():
        found = {split: read_rows(file) for split, file in _files(path).items()}
    elif path.exists() or source.endswith(TEXT_FILES):
        if not source.endswith(TEXT_FILES):
            raise RigsaError(f"--data {source}: expected a file that ends in {', '.join(TEXT_FILES)}")
        found = {"train": read_rows(path)}
    else:
        splits = hub_rows(source)
        found = {split: splits[name] for split, names in NAMES.items() for name in names if name in splits}
        if "train" not in found:
            raise RigsaError(f"--data {source}: expected a split named train, got {', '.join(splits)}")
    for split, rows in found.items():
        if not rows:
            raise RigsaError(f"--data {source}: expected examples in the {split} split, got none")
    return found


def _files(folder: Path) -> dict[str, Path]:
    """Split to its file in `folder`."""
    found: dict[str, Path] = {}
    for split, names in NAMES.items():
        files = [folder / f"{name}{ending}" for name in names for ending in TEXT_FILES]
        there = [file for file in files if file.exists()]
        if len(there) > 1:
            raise RigsaError(f"--data {folder}: expected one file for {split}, got {there[0].name} and {there[1].name}")
        if there:
            found[split] = there[0]
    if "train" not in found:
        raise RigsaError(
            f"--data {folder}: expected a file named train with one of the endings {', '.join(TEXT_FILES)}"
        )
    return found


def _split(examples: dict[str, list[Example]], share: float, source: str) -> tuple[dict[str, list[Example]], int]:
    """Three splits that share no prompt, and how many examples were left out for that: the test split keeps its own.

    A split without a file takes `share` of the training examples, by a hash of all before the answer, so an example
    stays where it is when others come or go.
    """
    held: dict[str, list[Example]] = {split: list(examples.get(split, [])) for split in ("validation", "test")}
    missing = [split for split in held if split not in examples]
    rest: list[Example] = []
    for example in examples["train"]:
        place = int(example.share() / share)
        (held[missing[place]] if place < len(missing) else rest).append(example)
    tested = {example.share() for example in held["test"]}
    validation = [example for example in held["validation"] if example.share() not in tested]
    shown = tested | {example.share() for example in validation}
    train = [example for example in rest if example.share() not in shown]
    twice = len(rest) - len(train) + len(held["validation"]) - len(validation)
    held["validation"] = validation
    for split, kept in (("training", train), *held.items()):
        if not kept:
            raise RigsaError(
                f"--data {source}: no example of {len(examples['train'])} is left for the {split} split; expected more "
                f"examples, another --validation-share than {share:g}, or files for the splits"
            )
    return {"train": train, **held}, twice
