"""A conversation in the terminal with the adapted model of a run folder (RIGSA, figure 6)."""

from __future__ import annotations

import contextlib
import io
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import TextStreamer

from rigsa.errors import RigsaError
from rigsa.experiments import bounds
from rigsa.experiments.config_file import load
from rigsa.experiments.experiment import Experiment
from rigsa.experiments.model import longest_of
from rigsa.experiments.records import metrics_of, read_record
from rigsa.experiments.run_folder import METRICS_FILE, finished_level
from rigsa.experiments.tasks.conversation import Turn
from rigsa.experiments.tasks.drift import greedy
from rigsa.experiments.tasks.evaluation import target_logits
from rigsa.experiments.tasks.special_tokens import until_special_token
from rigsa.experiments.tasks.task import IGNORED
from rigsa.experiments.tasks.text import TextTask
from rigsa.experiments.tasks.textual_mnist import TextualMnist, image_text, quantise
from rigsa.files import require_regular

Read = Callable[[str], str]
"""Works like `input`: shows a prompt, returns a line, raises EOFError at the end."""
Write = Callable[[str], object]
"""Shows a piece of text at once; line ends are in the text."""

HELP_DIGITS = """\
/digit NUMBER     show the model a test image of the run, as text, and have it read the digit
/digit FILE       the same with an image file (a name that is a number: ./7)
"""
HELP_TEXTS = """\
/example NUMBER   ask the model what a test example of the run asks, and see what the data answer
"""
HELP = """\
/adapter on|off   talk to the adapted model, or to its base; the conversation goes on
/reset            forget the conversation
/quit             end; so do Ctrl-D and Ctrl-C. While the model replies, Ctrl-C only stops the reply
Everything else is said to the model.
"""


NOT_UTF8 = "that line is not UTF-8, so the model cannot read it"
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "PPM")
MOST_PIXELS = 2**24
"""Of an image file: unpacked they take 64 MiB, four times over."""
LONGEST_NUMBER = 18
"""Digits of what is taken for the number of a test image."""


def write_now(text: str) -> None:
    print(text, end="", flush=True)


def run_chat(
    run: Path, level: int | None = None, max_new_tokens: int = 256, read: Read = input, write: Write = write_now
) -> None:
    """Load the adapted model of a run and talk to it until `read` ends.

    Args:
        run: folder of a run of any method.
        level: of the adapter; the last finished one by default.
        max_new_tokens: where a reply is cut.
        read: where lines come from.
        write: where text goes.

    Raises:
        RigsaError: there is no such run or level, or its model or data cannot be loaded. What goes wrong later is a
            message in the conversation.
    """
    bounds.check("max-new-tokens", max_new_tokens, bounds.TOKENS)
    config, level = load(run), finished_level(run, level)
    experiment = Experiment.prepare(config, run)
    experiment.attach()
    experiment.restore(level)
    experiment.model.eval()
    density = read_record(experiment.folder(level) / METRICS_FILE, metrics_of(config))["density"]
    write(f"{config.method}, level {level} ({density:.2%} of the weights), on {config.model}. /help lists commands.\n")
    if read is input and isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # a line that is not UTF-8 is one line lost, and not the rest
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # gives `input` arrow keys and a history
    talk(Chat(experiment, max_new_tokens, write), read, write)


def talk(chat: Chat, read: Read, write: Write) -> None:
    """Answer one line after another until `read` ends or a line is ``/quit``."""
    while True:
        try:
            line = read("\nyou> ")
        except (EOFError, KeyboardInterrupt):
            write("\n")
            return
        except UnicodeDecodeError as error:
            write(f"{NOT_UTF8} ({error.reason})\n")
            continue
        if line.strip() == "/quit":
            return
        try:
            chat.take(line)
        except RigsaError as error:
            write(f"{error}\n")
        except KeyboardInterrupt:
            write("\n(stopped)\n")


class Chat:
    """A conversation: its turns so far, and who replies.

    Args:
        experiment: with the adapter restored.
        max_new_tokens: where a reply is cut.
        write: where text goes.
    """

    def __init__(self, experiment: Experiment, max_new_tokens: int, write: Write) -> None:
        self.model, self.task, self.as_base = experiment.model, experiment.task, experiment.as_base
        self.conversation = experiment.task.conversation
        self.max_new_tokens, self.write = max_new_tokens, write
        self.turns: list[Turn] = []
        self.adapted = True

    def take(self, line: str) -> None:
        """One line: a command, or something said. Raises RigsaError for what cannot be done or said."""
        if any("\ud800" <= character <= "\udfff" for character in line):  # how bytes that are no text come in
            raise RigsaError(NOT_UTF8)
        commands = {"/adapter": self.adapter, "/reset": self.reset, "/help": self.help}
        commands |= {"/example": self.example} if isinstance(self.task, TextTask) else {"/digit": self.digit}
        if not line.startswith("/"):
            if line.strip():
                self.say(line)
            return
        name, _, argument = line.strip().partition(" ")
        if name not in commands:
            raise RigsaError(f"{name}: no such command. /help lists them; a space before it says it to the model.")
        commands[name](argument.strip())

    def say(self, text: str) -> None:
        """The model replies, word by word; what it said before a Ctrl-C stays said."""
        turns = [*self.turns, {"role": "user", "content": text}]
        ids = self._encode(turns, self.max_new_tokens)
        reply = _Reply(self.conversation.tokenizer, self.write)
        self.write(f"{self.speaker}> ")
        with self._speaking():
            try:
                (said,) = greedy(self.model, self.conversation, [ids], self.max_new_tokens, reply)
                content = self.conversation.tokenizer.decode(said, skip_special_tokens=True)
            except KeyboardInterrupt:
                reply.end()
                self.write("(stopped)\n")
                content = reply.text
        self._keep(turns, content)

    @torch.no_grad()
    def digit(self, which: str) -> None:
        """Prompt and answer as in training: the image is the user's turn, one token follows `Prompts.prefix`."""
        assert isinstance(self.task, TextualMnist)
        prompts = self.task.conversation
        levels, origin = self._image(which)
        turns = [*self.turns, {"role": "user", "content": image_text(levels)}]
        ids = self._encode(turns, 1, prompts.prefix)
        self.write(f"{image_text(levels)}\n({origin})\n")
        with self._speaking():
            asked = {"input_ids": torch.tensor([ids]), "targets": torch.tensor([[IGNORED]])}
            batch = {name: tensor.to(self.model.device) for name, tensor in asked.items()}
            token = target_logits(self.model, batch).argmax()
        answer = prompts.prefix + prompts.tokenizer.decode([token.item()])
        self.write(f"{self.speaker}> {answer}\n")
        self._keep(turns, answer)

    def example(self, which: str) -> None:
        """Say all turns of a test example but the last, and show what the data have the assistant say."""
        assert isinstance(self.task, TextTask)
        examples = self.task.splits["test"]
        if not (which.isdecimal() and len(which) <= LONGEST_NUMBER and int(which) < len(examples)):
            got = which[:LONGEST_NUMBER] or "nothing"
            raise RigsaError(f"/example: expected the number of a test example, 0 to {len(examples) - 1}, got {got}")
        example = examples[int(which)]
        if not example.turns:
            raise RigsaError("/example: the data are plain texts, which ask nothing; say the beginning of one")
        *before, asked, _ = example.turns
        self.turns = [turn for turn in before if turn["role"] != "system" or turn is before[0]]
        self.write(f"you> {asked['content']}\n")
        self.say(str(asked["content"]))
        self.write(f"data> {example.answer}\n")

    def _keep(self, turns: list[Turn], reply: str) -> None:
        """The reply becomes a turn, without what would end that."""
        content = until_special_token(self.conversation.tokenizer, reply)
        self.turns = [*turns, {"role": "assistant", "content": content}]

    def adapter(self, state: str) -> None:
        if state not in ("on", "off"):
            raise RigsaError(f"/adapter: expected on or off, got {state!r}; it is {'on' if self.adapted else 'off'}")
        self.adapted = state == "on"
        self.write(f"the adapter is {state}\n")

    def reset(self, _: str) -> None:
        self.turns = []
        self.write("the conversation is forgotten\n")

    def help(self, _: str) -> None:
        self.write((HELP_TEXTS if isinstance(self.task, TextTask) else HELP_DIGITS) + HELP)

    @property
    def speaker(self) -> str:
        return "adapted" if self.adapted else "base"

    def _speaking(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.adapted else self.as_base()

    def _encode(self, turns: list[Turn], room: int, prefill: str = "") -> list[int]:
        ids = self.conversation.ids(turns, prefill)
        longest = longest_of(self.model.config)
        if longest is not None and len(ids) + room > longest:
            raise RigsaError(
                f"the conversation would have {len(ids)} tokens and its reply up to {room}, but the model takes "
                f"{longest} in all; /reset forgets what was said"
            )
        return ids

    def _image(self, which: str) -> tuple[np.ndarray, str]:
        """uint8 levels ``[height, width]``, and where they come from."""
        assert isinstance(self.task, TextualMnist)
        images = self.task.splits.test
        count, height, width = images.levels.shape
        is_number = which.isdecimal()
        if is_number and len(which) <= LONGEST_NUMBER and int(which) < count:
            return images.levels[int(which)], f"test image {int(which)}, a {images.labels[int(which)]}"
        if is_number or not which:
            expected = f"the number of a test image, 0 to {count - 1}, or an image file"
            got = which if len(which) <= LONGEST_NUMBER else f"one of {len(which)} digits"
            raise RigsaError(f"/digit: expected {expected}, got {got or 'nothing'}")
        try:
            path = Path(which).expanduser()
        except RuntimeError as error:  # there is no such user
            raise RigsaError(f"/digit: {which}: {error}") from error
        return read_image(path, height, width)


class _Reply(TextStreamer):
    """Shows a reply word by word, and remembers it."""

    def __init__(self, tokenizer: object, write: Write) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)  # type: ignore[arg-type]
        self.write, self.text = write, ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        self.write(text + "\n" * stream_end)


def read_image(path: Path, height: int, width: int) -> tuple[np.ndarray, str]:
    """An image file as Textual MNIST has them: uint8 levels ``[height, width]``, the digit bright on dark.

    What is transparent becomes white. An image whose border is bright (its median over 127) is inverted. It is then
    scaled to fit, each pixel the mean of what it covers, and its background fills the rest.

    Returns:
        The levels, and what was done in words.

    Raises:
        RigsaError: it is not there, is not an image in one of `FORMATS`, or has more than `MOST_PIXELS`.
    """
    try:
        if path.exists():
            require_regular(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit here is a lower one
            opened = Image.open(path, formats=FORMATS)
        with opened:
            if opened.width * opened.height > MOST_PIXELS:  # known before any of them is unpacked
                raise ValueError(f"{opened.width}x{opened.height}; expected at most {MOST_PIXELS:,} pixels")
            image = opened.convert("RGBA")
        grey = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("L")
        pixels = np.asarray(grey)
        background = int(np.median(np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])))
        inverted = background > 127
        if inverted:
            grey, background = ImageOps.invert(grey), 255 - background
        scaled = ImageOps.pad(grey, (width, height), Image.Resampling.BOX, color=background)
    except Exception as error:  # a damaged file makes Pillow raise a dozen unrelated types
        reason = getattr(error, "strerror", None) or error
        raise RigsaError(f"/digit: {path} cannot be read as an image ({reason})") from error
    done = f"{path.name}, {'inverted as its background is bright, ' if inverted else ''}"
    return quantise(np.asarray(scaled), 255), f"{done}{image.width}x{image.height} scaled to {width}x{height}"
