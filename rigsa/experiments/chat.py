"""A conversation in the terminal with the adapted model of a run folder (RIGSA, figure 6)."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import TextStreamer

from rigsa.errors import RigsaError
from rigsa.experiments.adapter import adapter_off
from rigsa.experiments.config_file import load
from rigsa.experiments.experiment import Experiment
from rigsa.experiments.records import metrics_of, read_record
from rigsa.experiments.run_folder import METRICS_FILE, finished_levels
from rigsa.experiments.tasks.drift import chat_ids, greedy
from rigsa.experiments.tasks.evaluation import answer_logits
from rigsa.experiments.tasks.textual_mnist import ANSWER_PREFIX, image_text, quantise

Read = Callable[[str], str]
"""Works like `input`: shows a prompt, returns a line, raises EOFError at the end."""
Write = Callable[[str], object]
"""Shows a piece of text at once; line ends are in the text."""

HELP = """\
/digit NUMBER     show the model a test image of the run, as text, and have it read the digit
/digit FILE       the same with an image file (a name that is a number: ./7)
/adapter on|off   talk to the adapted model, or to its base; the conversation goes on
/reset            forget the conversation
/quit             end; so do Ctrl-D and Ctrl-C. While the model replies, Ctrl-C only stops the reply
Everything else is said to the model.
"""


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
    if max_new_tokens < 1:
        raise RigsaError(f"--max-new-tokens: expected 1 or more, got {max_new_tokens}")
    config, level = load(run), finished_level(run, level)
    experiment = Experiment.prepare(config, run)
    experiment.attach()
    experiment.restore(level)
    experiment.model.eval()
    density = read_record(experiment.folder(level) / METRICS_FILE, metrics_of(config))["density"]
    write(f"{config.method}, level {level} ({density:.2%} of the weights), on {config.model}. /help lists commands.\n")
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # gives `input` arrow keys and a history
    talk(Chat(experiment, max_new_tokens, write), read, write)


def finished_level(run: Path, level: int | None) -> int:
    """`level` itself, or for None the last finished one. Raises RigsaError if it is not finished."""
    finished = finished_levels(run)
    if not finished:
        raise RigsaError(f"{run} has no finished level to talk to; let the run finish one first")
    if level is None:
        return finished[-1]
    if level not in finished:
        known = ", ".join(map(str, finished))
        raise RigsaError(f"--level: expected a finished level of {run} ({known}), got {level}")
    return level


def talk(chat: Chat, read: Read, write: Write) -> None:
    """Answer one line after another until `read` ends or a line is ``/quit``."""
    while True:
        try:
            line = read("\nyou> ")
        except (EOFError, KeyboardInterrupt):
            write("\n")
            return
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
        self.model, self.prompts, self.images = experiment.model, experiment.prompts, experiment.splits.test
        self.max_new_tokens, self.write = max_new_tokens, write
        self.turns: list[dict[str, str]] = []
        self.adapted = True

    def take(self, line: str) -> None:
        """One line: a command, or something said. Raises RigsaError for a command that cannot be done."""
        commands = {"/digit": self.digit, "/adapter": self.adapter, "/reset": self.reset, "/help": self.help}
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
        reply = _Reply(self.prompts.tokenizer, self.write)
        self.write(f"{self.speaker}> ")
        with self._speaking():
            try:
                (said,) = greedy(self.model, self.prompts, [ids], self.max_new_tokens, reply)
                content = self.prompts.tokenizer.decode(said, skip_special_tokens=True)
            except KeyboardInterrupt:
                reply.end()
                self.write("(stopped)\n")
                content = reply.text
        self.turns = [*turns, {"role": "assistant", "content": content}]

    @torch.no_grad()
    def digit(self, which: str) -> None:
        """Prompt and answer as in training: the image is the user's turn, one token follows `ANSWER_PREFIX`."""
        levels, origin = self._image(which)
        turns = [*self.turns, {"role": "user", "content": image_text(levels)}]
        ids = self._encode(turns, 1, ANSWER_PREFIX)
        self.write(f"{image_text(levels)}\n({origin})\n")
        with self._speaking():
            token = answer_logits(self.model, {"input_ids": torch.tensor([ids], device=self.model.device)}).argmax()
        answer = ANSWER_PREFIX + self.prompts.tokenizer.decode([token.item()])
        self.write(f"{self.speaker}> {answer}\n")
        self.turns = [*turns, {"role": "assistant", "content": answer}]

    def adapter(self, state: str) -> None:
        if state not in ("on", "off"):
            raise RigsaError(f"/adapter: expected on or off, got {state!r}; it is {'on' if self.adapted else 'off'}")
        self.adapted = state == "on"
        self.write(f"the adapter is {state}\n")

    def reset(self, _: str) -> None:
        self.turns = []
        self.write("the conversation is forgotten\n")

    def help(self, _: str) -> None:
        self.write(HELP)

    @property
    def speaker(self) -> str:
        return "adapted" if self.adapted else "base"

    def _speaking(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.adapted else adapter_off(self.model)

    def _encode(self, turns: list[dict[str, str]], room: int, prefill: str = "") -> list[int]:
        ids = chat_ids(self.prompts, turns, prefill)
        longest = getattr(self.model.config, "max_position_embeddings", None)
        if longest is not None and len(ids) + room > longest:
            raise RigsaError(
                f"the conversation would have {len(ids)} tokens and its reply up to {room}, but the model takes "
                f"{longest} in all; /reset forgets what was said"
            )
        return ids

    def _image(self, which: str) -> tuple[np.ndarray, str]:
        """uint8 levels ``[height, width]``, and where they come from."""
        count, height, width = self.images.levels.shape
        if which.isdecimal() and int(which) < count:
            return self.images.levels[int(which)], f"test image {int(which)}, a {self.images.labels[int(which)]}"
        if which.isdecimal() or not which:
            expected = f"the number of a test image, 0 to {count - 1}, or an image file"
            raise RigsaError(f"/digit: expected {expected}, got {which or 'nothing'}")
        return read_image(Path(which).expanduser(), height, width)


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
        RigsaError: it is not there, or not an image.
    """
    try:
        with Image.open(path) as opened:
            image = opened.convert("RGBA")
        grey = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("L")
        pixels = np.asarray(grey)
        background = int(np.median(np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])))
        inverted = background > 127
        if inverted:
            grey, background = ImageOps.invert(grey), 255 - background
        scaled = ImageOps.pad(grey, (width, height), Image.Resampling.BOX, color=background)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RigsaError(f"/digit: {path} cannot be read as an image ({reason})") from error
    done = f"{path.name}, {'inverted as its background is bright, ' if inverted else ''}"
    return quantise(np.asarray(scaled), 255), f"{done}{image.width}x{image.height} scaled to {width}x{height}"
