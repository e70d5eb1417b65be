"""A conversation with the adapter of a run: what is shown, what the model is given, and what goes wrong politely."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rigsa.errors import RigsaError
from rigsa.experiments import chat as chat_module
from rigsa.experiments.chat import HELP, Chat, read_image, run_chat, talk
from rigsa.experiments.config_file import load
from rigsa.experiments.experiment import Experiment
from rigsa.experiments.tasks.textual_mnist import Prompts, image_text, load_splits
from rigsa_kernels import gated_linears

WIDTH = HEIGHT = 8


@pytest.fixture
def run(talking_run: Path) -> Path:
    return talking_run


@pytest.fixture
def experiment(talking_experiment: Experiment) -> Experiment:
    return talking_experiment


def script(*lines: str | type[BaseException]) -> Callable[[str], str]:
    """A `read` that gives these lines, raises these exceptions, then ends."""
    left = [*lines, EOFError]

    def read(prompt: str) -> str:
        line = left.pop(0)
        if isinstance(line, str):
            return line
        raise line

    return read


def converse(experiment: Experiment, *lines: str | type[BaseException], tokens: int = 8) -> tuple[str, Chat]:
    """What is shown, and the conversation."""
    shown: list[str] = []
    chat = Chat(experiment, tokens, shown.append)
    talk(chat, script(*lines), shown.append)
    return "".join(shown), chat


@torch.no_grad()
def greedy_by_hand(experiment: Experiment, turns: list[dict[str, str]], count: int) -> list[int]:
    """The reply to a conversation of the model as it is: no cache, no stream."""
    tokenizer = experiment.task.conversation.tokenizer
    system = {"role": "system", "content": ""}  # of the smoke preset
    text = tokenizer.apply_chat_template([system, *turns], tokenize=False, add_generation_prompt=True)
    ids, reply = tokenizer(text)["input_ids"], []
    while len(reply) < count and tokenizer.eos_token_id not in reply:
        reply.append(int(experiment.model(torch.tensor([ids + reply])).logits[0, -1].argmax()))
    return reply


def spoken(experiment: Experiment, reply: list[int]) -> str:
    return experiment.task.conversation.tokenizer.decode(reply, skip_special_tokens=True)


def test_a_run_folder_talks_from_the_command_that_made_it(run, capsys):
    shown: list[str] = []
    run_chat(run, read=script("The digit", "/quit", "never read"), write=shown.append)
    assert "".join(shown).startswith("imp, level 1 (")
    assert f"on {load(run).model}. /help lists commands.\nadapted> " in "".join(shown)
    run_chat(run, 0, read=script(), write=shown.append)
    assert "imp, level 0 (100.00% of the weights)" in "".join(shown)


def test_replies_are_greedy_and_stay_in_the_conversation(experiment):
    turns: list[dict[str, str]] = []
    want = ""
    for line in ("The digit is 7", " user", " /help"):
        turns.append({"role": "user", "content": line})
        reply = spoken(experiment, greedy_by_hand(experiment, turns, 8))
        turns.append({"role": "assistant", "content": reply})
        want += f"adapted> {reply}\n"
    shown, chat = converse(experiment, "The digit is 7", "", " user", " /help")
    assert chat.turns == turns
    assert shown.split() == want.split()  # a stream forgets, after a line end, that this tokenizer joins with spaces


def test_a_reply_comes_word_by_word(experiment):
    pieces: list[str] = []
    chat = Chat(experiment, 8, pieces.append)
    chat.say("The digit is 7")
    assert pieces[0] == "adapted> "
    assert len([piece for piece in pieces[1:] if piece.strip()]) > 2


def test_the_adapter_can_be_switched_off_and_on(experiment):
    lines = ("The digit", "/adapter off", "/reset", "The digit", "/adapter on", "/reset", "The digit")
    shown, _ = converse(experiment, *lines)
    replies = [line for line in shown.splitlines() if "> " in line]
    base = Experiment.prepare(experiment.config, experiment.run)
    of_base = spoken(base, greedy_by_hand(base, [{"role": "user", "content": "The digit"}], 8))
    assert replies[0] == replies[2] != replies[1].replace("base", "adapted")
    assert replies[1].rstrip() == f"base> {of_base}".rstrip()
    assert "the adapter is off\n" in shown
    assert "the adapter is on\n" in shown
    assert all(layer.enabled for layer in gated_linears(experiment.model).values())


@torch.no_grad()
def test_a_test_image_is_asked_as_in_training(experiment):
    images = load_splits("digits").test
    prompts = Prompts(experiment.task.conversation.tokenizer, "")
    for index in (0, 7):
        token = experiment.model(torch.tensor([prompts.image_ids(images.levels[index])])).logits[0, -1].argmax()
        answer = f"The digit is {prompts.tokenizer.decode([int(token)])}"
        shown, chat = converse(experiment, f"/digit {index}")
        text = image_text(images.levels[index])
        assert shown == f"{text}\n(test image {index}, a {images.labels[index]})\nadapted> {answer}\n\n"
        assert chat.turns == [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]


def test_what_is_asked_mid_conversation_stands_in_it_as_an_example_would(experiment, monkeypatch):
    asked: list[list[int]] = []
    target_logits = chat_module.target_logits

    def listen(model, batch):  # type: ignore[no-untyped-def]
        asked.append(batch["input_ids"][0].tolist())
        logits = target_logits(model, batch)
        return torch.nn.functional.one_hot(experiment.task.conversation.digit_ids[label], logits.shape[-1])[None, None]

    images = load_splits("digits").test
    label = int(images.labels[3])
    monkeypatch.setattr(chat_module, "target_logits", listen)
    _, chat = converse(experiment, "/digit 3", "/digit 5", "The digit")
    assert asked[0] == experiment.task.conversation.image_ids(images.levels[3])
    tokenizer = experiment.task.conversation.tokenizer
    shown = image_text(images.levels[3])
    turns = [
        {"role": "system", "content": ""}, {"role": "user", "content": shown},
        {"role": "assistant", "content": f"The digit is {label}"},
        {"role": "user", "content": image_text(images.levels[5])},
    ]  # fmt: skip
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) + "The digit is "
    assert asked[1] == tokenizer(text)["input_ids"]
    assert asked[1] == experiment.task.conversation.image_ids(images.levels[5], images.take([3]))
    assert len(chat.turns) == 6


@pytest.mark.parametrize("bright", [False, True])
def test_an_image_file_becomes_the_levels_it_was_made_from(bright, tmp_path, experiment):
    levels = load_splits("digits").test.levels[2]
    levels = np.pad(levels[1:-1, 1:-1], 1)  # a dark border
    pixels = np.kron(levels, np.ones((6, 6))) * 25 + 13
    Image.fromarray((255 - pixels if bright else pixels).astype(np.uint8)).save(tmp_path / "drawn digit.png")
    got, done = read_image(tmp_path / "drawn digit.png", HEIGHT, WIDTH)
    assert np.array_equal(got, levels)
    assert ("inverted as its background is bright" in done) is bright
    shown, _ = converse(experiment, f"/digit {tmp_path / 'drawn digit.png'}")
    assert shown.startswith(f"{image_text(levels)}\n(drawn digit.png, ")
    assert "48x48 scaled to 8x8)\nadapted> The digit is " in shown


def test_images_of_other_kinds_and_shapes(tmp_path):
    ink = np.zeros((40, 20, 4), np.uint8)
    ink[10:30, 5:15] = (0, 0, 0, 255)  # black on nothing
    Image.fromarray(ink).save(tmp_path / "clear.png")
    got, done = read_image(tmp_path / "clear.png", 8, 8)
    want = np.zeros((8, 8), np.uint8)
    want[2:6, 3:5] = 9  # 4 columns wide, in the middle
    assert np.array_equal(got, want)
    assert done == "clear.png, inverted as its background is bright, 20x40 scaled to 8x8"
    Image.new("RGB", (30, 30), (255, 0, 0)).save(tmp_path / "red.jpg")
    assert read_image(tmp_path / "red.jpg", 28, 20)[0].shape == (28, 20)


def broken_images(folder: Path) -> list[str]:
    (folder / "words.png").write_text("no image")
    Image.effect_noise((64, 64), 50).save(folder / "whole.png")
    (folder / "cut.png").write_bytes((folder / "whole.png").read_bytes()[:1000])
    return ["words.png", "cut.png", ".", "absent.png"]


def test_errors_are_messages_and_keep_the_conversation(experiment, tmp_path):
    files = [f"/digit {tmp_path / name}" for name in broken_images(tmp_path)]
    wrong = ["/digit 20", "/digit", "/shout", "/adapter", "/adapter maybe"]
    shown, chat = converse(experiment, "The digit", *files, *wrong, "is")
    lines = shown.splitlines()
    assert len(chat.turns) == 4
    start = next(index for index, line in enumerate(lines) if line.startswith("/digit"))
    assert all("cannot be read as an image" in line for line in lines[start : start + 4])
    assert lines[start + 3].endswith("absent.png cannot be read as an image (No such file or directory)")
    nothing = "/digit: expected the number of a test image, 0 to 19, or an image file, got "
    assert lines[start + 4 : start + 9] == [
        f"{nothing}20",
        f"{nothing}nothing",
        "/shout: no such command. /help lists them; a space before it says it to the model.",
        "/adapter: expected on or off, got ''; it is on",
        "/adapter: expected on or off, got 'maybe'; it is on",
    ]


def test_a_conversation_that_has_grown_too_long_says_so(experiment):
    said = "is " * 250
    shown, chat = converse(experiment, "The digit", said, "/digit 1", "/reset", "The digit")
    assert "and its reply up to 8, but the model takes 512 in all; /reset forgets what was said\n" in shown
    assert len(chat.turns) == 2


def test_help_reset_and_the_ways_to_end(experiment):
    shown, chat = converse(experiment, "The digit", "/reset", "/help", "/quit", "The digit")
    assert "the conversation is forgotten\n" in shown
    assert shown.endswith(HELP)
    assert chat.turns == []
    assert converse(experiment, KeyboardInterrupt, "The digit")[0] == "\n"
    assert converse(experiment)[0] == "\n"


@pytest.mark.parametrize("switch", ["/adapter on", "/adapter off"])
def test_ctrl_c_stops_a_reply_and_keeps_what_was_said(switch, experiment):
    shown: list[str] = []

    def write(text: str) -> None:
        shown.append(text)
        if len([piece for piece in shown if piece.strip()]) == 4 and not interrupted:
            interrupted.append(True)
            raise KeyboardInterrupt

    interrupted: list[bool] = []
    chat = Chat(experiment, 8, write)
    talk(chat, script(switch, "The digit is 7", "The digit"), write)
    whole = "".join(shown)
    assert whole.count("(stopped)\n") == 1
    assert [turn["role"] for turn in chat.turns] == ["user", "assistant"] * 2
    said = chat.turns[1]["content"]
    assert said.strip()
    assert f"> {said}\n(stopped)\n" in whole
    assert all(layer.enabled for layer in gated_linears(experiment.model).values())


def test_ctrl_c_during_a_digit_forgets_the_question(experiment, monkeypatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(chat_module, "target_logits", interrupt)
    shown, chat = converse(experiment, "/digit 1", "The digit")
    assert "(stopped)\n" in shown
    assert len(chat.turns) == 2


def test_what_cannot_be_talked_to_is_named_before_a_model_is_loaded(run, tmp_path, monkeypatch):
    monkeypatch.setattr(Experiment, "prepare", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(RigsaError, match="nowhere: no such run folder"):
        run_chat(tmp_path / "nowhere")
    with pytest.raises(RigsaError, match=r"--level: expected a finished level of .* \(0, 1\), got 7"):
        run_chat(run, 7)
    with pytest.raises(RigsaError, match="--max-new-tokens: expected 1 to 1,000,000, got 0"):
        run_chat(run, max_new_tokens=0)
    shutil.copytree(run, tmp_path / "young", ignore=shutil.ignore_patterns("done"))
    with pytest.raises(RigsaError, match="has no finished level; let the run finish one first"):
        run_chat(tmp_path / "young")


def test_the_last_level_is_the_largest_finished_number(tmp_path):
    for level in (0, 2, 10, 11):
        (tmp_path / f"level_{level}").mkdir()
        if level != 11:
            (tmp_path / f"level_{level}" / "done").touch()
    (tmp_path / "level_x").mkdir()
    (tmp_path / "level_x" / "done").touch()
    from rigsa.experiments.run_folder import finished_level

    assert finished_level(tmp_path, None) == 10
    assert finished_level(tmp_path, 2) == 2
