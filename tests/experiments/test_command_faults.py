"""Commands that are given what they cannot do: one line, the right exit code, and nothing trained or written."""

from __future__ import annotations

import argparse
import functools
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import make_llama, make_tokenizer
from rigsa.errors import RigsaError
from rigsa.experiments.bounds import Number, Range
from rigsa.experiments.config import OPTIONS, Config
from rigsa.experiments.experiment import Experiment
from rigsa.experiments.layer_checks import check_layers
from rigsa.experiments.methods.registry import METHODS
from rigsa.experiments.presets import PRESETS, smoke
from rigsa.experiments.sweep_plan import Shard, plan_sweep
from rigsa.files import write_json
from rigsa.run import build_parser
from tests.experiments.test_run import failure


@functools.cache
def commands() -> dict[str, argparse.ArgumentParser]:
    (found,) = [action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(found.choices)


NEEDED = {
    "sweep": ["--methods", "imp"], "compare": ["--methods", "imp"], "chat": ["RUN"], "measure": ["RUN"],
    "export": ["RUN", "--to", "merged"], "merge": ["RUN", "--out", "x"],
}  # fmt: skip
"""Arguments without which a command's parser takes nothing."""
NUMBERS = [
    (command, action)
    for command, parser in commands().items()
    for action in parser._actions
    if isinstance(action.type, Number)
]


def test_every_numeric_option_has_a_range_that_its_help_states():
    numeric = {name for name, field in OPTIONS.items() if type(field.default) in (int, float)}
    found = {action.dest for _, action in NUMBERS}
    assert found == numeric | {"gpu_memory", "tokens", "same_sign_share", "level", "max_new_tokens"}
    for command, parser in commands().items():
        for action in parser._actions:
            assert action.type not in (int, float), f"{command} {action.dest} has no range"
    for command, action in NUMBERS:
        assert isinstance(action.type.bound, Range), (command, action.dest)
        assert f"({action.type.bound.expected})" in action.help
        assert math.isfinite(action.type.bound.least)
        assert math.isfinite(action.type.bound.most)


def inside_and_outside(kind: type, bound: Range) -> tuple[list[float], list[float]]:
    """The ends and what lies next to them."""
    if kind is int:
        least, most = int(bound.least), int(bound.most)
        return [least, most], [least - 1, most + 1, 2**64, -(2**64)]
    low, high = math.nextafter(bound.least, math.inf), math.nextafter(bound.most, -math.inf)
    inside = [low if bound.above else bound.least, high if bound.below else bound.most]
    outside = [
        bound.least if bound.above else math.nextafter(bound.least, -math.inf),
        bound.most if bound.below else math.nextafter(bound.most, math.inf),
    ]
    return inside, [*outside, math.nan, math.inf, -math.inf, 1e308, -1e308]


@pytest.mark.parametrize(("command", "action"), NUMBERS, ids=[f"{name} {action.dest}" for name, action in NUMBERS])
def test_ends_are_taken_and_what_lies_beyond_is_refused(command, action):
    """By the parser itself; there the values are checked before the command is asked."""
    parser, option = commands()[command], action.option_strings[0]
    needed = NEEDED.get(command, [])
    inside, outside = inside_and_outside(action.type.kind, action.type.bound)
    for value in inside:
        assert getattr(parser.parse_args([*needed, f"{option}={value!r}"]), action.dest) == value
    for value in outside:
        with pytest.raises(RigsaError, match=f"{option}: expected .*, got"):
            parser.parse_args([*needed, f"{option}={value!r}"])
    for text in ("²", "x", "", "1" * 5000 if action.type.kind is int else "0x"):
        with pytest.raises(RigsaError, match=f"{option}: expected a (whole )?number, .*, got '"):
            parser.parse_args([*needed, f"{option}={text}"])


@pytest.mark.parametrize(
    "name", [name for name, field in OPTIONS.items() if isinstance(field.metadata["bound"], Range)]
)
def test_a_configuration_holds_to_the_ranges_wherever_it_comes_from(name):
    field = OPTIONS[name]
    for value in inside_and_outside(type(field.default), field.metadata["bound"])[1]:
        with pytest.raises(RigsaError, match=f"--{name.replace('_', '-')}: expected"):
            Config(method=METHODS["imp"], **{name: value})


@given(st.text(max_size=8))
def test_numbers_of_examples_are_numbers(text):
    try:
        shots = Config(method=METHODS["imp"], eval_shots=text).shots
    except RigsaError:
        return
    assert shots
    assert all(0 <= number < 10**6 for number in shots)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["imp", "--eval-shots", "²"], "--eval-shots: expected numbers from 0 to 999,999 separated by commas, got ²"),
        (["imp", "--gpu-memory", "nan"], "--gpu-memory: expected more than 0 and at most 1,000,000, got nan"),
        (["imp", "--alpha-init", "1e308"], "--alpha-init: expected -1,000 to 1,000, got 1e+308"),
        (["imp", "--prunings", "999999999"], "--prunings: expected 0 to 100, got 999999999"),
        (["imp", "--epochs", str(2**64)], f"--epochs: expected 1 to 1,000,000,000, got {2**64}"),
        (["sweep", "--methods=--"], "--methods: expected a value, got '--'"),
        (["imp", "--model=--"], "--model: expected a value, got '--'"),
        (["sweep", "--methods", "imp", "--seeds", "9" * 5000], "--seeds: expected numbers from 0 to 2**63 - 1"),
        (["sweep", "--methods", "imp", "--shard", f"1/{'9' * 5000}"], "--shard: expected i/n"),
        (["sweep", "--methods", "imp", "--vary", f"prunings={'9' * 5000}"], "--vary prunings: expected whole numbers"),
        (["imp", "--out", os.fsdecode(b"caf\xe9")], r"expected a path in UTF-8, got b'caf\xe9'"),
        (["imp", "--system-prompt", os.fsdecode(b"\xff")], r"--system-prompt: expected text in UTF-8, got b'\xff'"),
        (["imp", "--out", "x" * 300], "File name too long"),
        (["plan", "--gpu-memory", "inf"], "--gpu-memory: expected more than 0 and at most 1,000,000, got inf"),
    ],
)  # fmt: skip
def test_what_was_taken_in_silence_or_ended_in_a_traceback_is_one_line(arguments, message, tmp_path, capsys):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        assert message in failure(arguments, capsys)
    assert list(tmp_path.iterdir()) == []


def small(model: Path, *more: str) -> list[str]:
    return ["--preset", "smoke", "--device", "cpu", "--dtype", "float32", "--model", str(model), *more]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["imp", "--keep-fraction", "0.0001"], "--keep-fraction: 0.0001 leaves model.layers.0.self_attn.q_proj empty"),
        (["imp", "--ranking", "global", "--keep-fraction", "1e-6"], "--keep-fraction: 1e-06 leaves every layer empty"),
        (["lt-sft", "--density", "0.0001"], "--density: 0.0001 leaves model.layers.0.self_attn.q_proj empty"),
        (["spiel", "--density", "0.0001"], "--density: 0.0001 leaves"),
        (["random-mask", "--density", "0.0001"], "--density: 0.0001 leaves"),
        (["lora", "--rank", "5000"], "--rank: expected at most 32 (model.layers.0.self_attn.q_proj is 32 x 32)"),
        (["rosa", "--rank", "33"], "--rank: expected at most 32"),
        (["shira", "--rank", "17"], "--rank: expected at most 16"),
        (["imp", "--eval-shots", "0,1000", "--train-examples", "24"], "there are only 24 training images to show"),
        (["imp", "--logging-steps", "2", "--max-steps", "1"], "--logging-steps: expected at most the 1 steps"),
    ],
)  # fmt: skip
def test_what_can_be_known_is_refused_before_anything_is_trained_or_written(
    arguments, message, small_model_folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(Experiment, "measure_base", lambda _: pytest.fail("it measures already"))
    out = tmp_path / "run"
    arguments = [arguments[0], *small(small_model_folder), *arguments[1:], "--out", str(out)]
    assert message in failure(arguments, capsys)
    assert not out.exists()


def test_a_layer_too_wide_for_a_ticket_is_named():
    shapes = {"narrow": (4, 65_536), "wide": (4, 65_537)}
    sizes = {name: rows * columns for name, (rows, columns) in shapes.items()}
    for method, refused in (("imp", True), ("lt-sft", True), ("random-mask", True), ("full", False), ("lora", False)):
        config = smoke(method)
        config = Config(method=METHODS[method], **{name: getattr(config, name) for name in OPTIONS} | {"rank": 1})
        if refused:
            with pytest.raises(RigsaError, match="wide has 65,537 columns; expected at most 65,536 in a ticket"):
                check_layers(config, shapes, sizes)
        else:
            check_layers(config, shapes, sizes)
    check_layers(Config(method=METHODS["imp"], prunings=0), shapes, sizes)


@given(st.integers(1, 2000), st.floats(0.01, 1), st.integers(0, 12))
def test_no_ticket_that_pruning_could_choose_is_refused(weights, keep, prunings):
    """If every entry stayed eligible, each pruning would keep a rounded share of what is left."""
    config = Config(method=METHODS["imp"], keep_fraction=keep, prunings=prunings)
    left = weights
    for _ in range(prunings):
        left = round(keep * left)
    assert config.method.most_kept(config, weights) == left


def test_a_random_mask_is_matched_to_imp_runs_only(small_model_folder, tmp_path, capsys):
    write_json(tmp_path / "full" / "config.json", smoke("full").record())
    out = tmp_path / "random"
    command = ["random-mask", *small(small_model_folder), "--match", str(tmp_path / "full"), "--out", str(out)]
    assert "expected the folder of an imp run, got one of full" in failure(command, capsys)
    assert not out.exists()


MODEL_FAULTS = {
    "a weight is missing": ({"model.norm.weight": None}, "1 missing (model.norm.weight)"),
    "a weight too many": ({"model.extra.weight": torch.zeros(3)}, "1 unexpected (model.extra.weight)"),
    "another shape": ({"model.norm.weight": torch.ones(31)}, "1 of another shape (model.norm.weight)"),
}


@pytest.mark.parametrize("fault", MODEL_FAULTS)
def test_a_model_folder_with_other_weights_is_refused(fault, tmp_path, capsys):
    changes, message = MODEL_FAULTS[fault]
    weights = {**make_llama().state_dict(), **changes}
    make_tokenizer().save_pretrained(tmp_path / "model")
    make_llama().save_pretrained(
        tmp_path / "model", state_dict={name: weight for name, weight in weights.items() if weight is not None}
    )
    if "extra" in message:  # which save_pretrained leaves out
        from safetensors.torch import load_file, save_file

        path = tmp_path / "model" / "model.safetensors"
        save_file(load_file(path) | {"model.extra.weight": torch.zeros(3)}, path, {"format": "pt"})
    text = failure(["imp", *small(tmp_path / "model"), "--out", str(tmp_path / "run")], capsys)
    assert f"expected the weights of LlamaForCausalLM, got {message}" in text
    assert not (tmp_path / "run").exists()


def test_a_model_folder_that_names_another_architecture_is_refused(tmp_path, capsys):
    make_llama().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text().replace("llama", "mistral").replace("Llama", "Mistral"))
    text = config.read_text().replace("mistral", "gpt2").replace("MistralForCausalLM", "GPT2LMHeadModel")
    config.write_text(text)
    message = failure(["imp", *small(tmp_path / "model"), "--out", str(tmp_path / "run")], capsys)
    assert "expected the weights of GPT2LMHeadModel" in message
    assert "missing" in message
    assert "unexpected" in message


def test_code_that_a_model_brings_along_is_never_asked_for(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks"))
    make_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(
        '{"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnModel"}}'
    )
    (tmp_path / "model" / "own.py").write_text("raise SystemExit('its code runs')")
    for command in (["imp", *small(tmp_path / "model")], ["plan", "--model", str(tmp_path / "model")]):
        assert f"--model {tmp_path}/model: " in failure(command, capsys)


def run_module(*arguments: str, **options: object) -> subprocess.Popen:  # type: ignore[type-arg]
    def prepare() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell in the background has children ignore it

    command = [sys.executable, "-m", "rigsa.run", *arguments]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=prepare, **options)  # type: ignore[call-overload]


@pytest.mark.parametrize("arguments", [["imp", "--dry-run"], ["imp", "--help"]])
def test_output_that_nobody_reads_and_a_full_device_are_one_line(arguments):
    for reader in ("pipe", "full"):
        if reader == "pipe":
            read, write = os.pipe()
            os.close(read)
        else:
            write = os.open("/dev/full", os.O_WRONLY)
        process = run_module(*arguments, stdout=write)
        os.close(write)
        _, error = process.communicate(timeout=120)
        if "--help" in arguments and process.returncode == 0:  # argparse itself is content to say nothing
            assert error == ""
            continue
        assert process.returncode == 1
        assert error.splitlines() == [
            f"rigsa: input or output failed: {'Broken pipe' if reader == 'pipe' else 'No space left on device'}"
        ]


def test_ctrl_c_while_it_starts_is_one_line():
    moments = random.Random(0)
    for _ in range(4):
        process = run_module("imp", "--preset", "smoke", "--model", "/nowhere", stdout=subprocess.DEVNULL)
        time.sleep(moments.uniform(0.15, 1.5))
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=120)
        assert "Traceback" not in error
        # Where C code of an import ran Python code, Python ends by the signal itself: a shell has 130 for both.
        assert (process.returncode, "interrupted" in error) in ((130, True), (-signal.SIGINT, True), (1, False)), error


def test_every_preset_is_within_the_ranges():
    for preset in PRESETS.values():
        for method in METHODS:
            assert preset(method).record()["method"] == method


def test_shards_and_seeds_are_plain_numbers(tmp_path):
    for text in ("1/²", "٣/4", "1/1/1"):
        with pytest.raises(RigsaError, match="--shard: expected i/n"):
            Shard.parse(text)
    with pytest.raises(RigsaError, match="--seeds: expected numbers"):
        plan_sweep("imp", "٣", [], preset="smoke", options={}, out=tmp_path)
