"""``rigsa merge`` and ``rigsa inspect``: from run folders and saved adapters to plain models, tables and figures."""

import json
import os
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import rigsa
from conftest import make_llama, make_tokenizer
from rigsa import inspection
from rigsa.experiments.config_file import load
from rigsa.experiments.experiment import Experiment
from rigsa.files import write_folder
from rigsa.run import main
from rigsa_kernels.linear import HALF_DTYPES

IDS = torch.arange(20)[None]


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "base"
    make_llama(hidden_size=64, intermediate_size=128).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(base, tmp_path):
    """A folder of `save_adapter`, and the model that it is of."""
    model = rigsa.replace_linears(AutoModelForCausalLM.from_pretrained(base), density=0.2, alpha_init=0.5)
    rigsa.save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter", model


def failure(arguments, capsys):
    assert main([str(argument) for argument in arguments]) == 1
    return capsys.readouterr().err


@pytest.mark.parametrize("level", [0, 1])
def test_a_run_becomes_a_plain_model(talking_run, level, tmp_path, capsys):
    out = tmp_path / "new" / "merged"
    assert main(["merge", str(talking_run), "--out", str(out), "--level", str(level)]) == 0
    assert f"layers are merged: {out}" in capsys.readouterr().out
    experiment = Experiment.prepare(load(talking_run), talking_run)
    experiment.attach()
    experiment.restore(level)
    plain = AutoModelForCausalLM.from_pretrained(out, attn_implementation=experiment.config.attention)
    assert type(plain.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert torch.equal(logits(plain), logits(experiment.model))
    assert (
        AutoTokenizer.from_pretrained(out)("1 2").input_ids == experiment.task.conversation.tokenizer("1 2").input_ids
    )
    assert [path.name for path in out.parent.iterdir()] == ["merged"]


def test_a_saved_adapter_becomes_a_plain_model(adapter, tmp_path):
    folder, model = adapter
    assert main(["merge", str(folder), "--out", str(tmp_path / "merged")]) == 0
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), logits(model))


def test_in_16_bits_rounding_is_said_or_avoided(base, tmp_path, capsys):
    make_llama(hidden_size=64, intermediate_size=128).bfloat16().save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    rigsa.save_adapter(rigsa.replace_linears(model, density=0.2, alpha_init=1e-4), tmp_path / "small")
    rigsa.save_adapter(
        rigsa.replace_linears(rigsa.restore_linears(model), density=0.2, alpha_init=0.5), tmp_path / "large"
    )
    assert model.dtype in HALF_DTYPES
    small, out = tmp_path / "small", tmp_path / "merged"
    assert "give --dtype float32" in failure(["merge", small, "--out", out], capsys)
    assert not out.exists()
    assert main(["merge", str(small), "--out", str(out), "--dtype", "float32"]) == 0
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.float32
    assert main(["merge", str(tmp_path / "large"), "--out", str(tmp_path / "16")]) == 0
    assert "% of them lost to rounding in 16 bits" in capsys.readouterr().out


def test_a_base_in_four_bits_is_merged_where_that_is_asked_for(base, tmp_path, capsys):
    pytest.importorskip("bitsandbytes")
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=settings, dtype=torch.float32)
    rigsa.save_adapter(rigsa.replace_linears(model, density=0.2, alpha_init=0.5), tmp_path / "adapter")
    command = ["merge", tmp_path / "adapter", "--out", tmp_path / "merged"]
    assert "give --dequantize" in failure(command, capsys)
    assert main([*map(str, command), "--dequantize"]) == 0
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not hasattr(plain.config, "quantization_config")
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-4, atol=1e-4)


def test_what_cannot_be_merged_is_one_message_and_nothing_is_written(adapter, talking_run, base, tmp_path, capsys):
    folder, out = adapter[0], tmp_path / "merged"
    nameless = shutil.copytree(folder, tmp_path / "nameless")
    rigsa.save_adapter(rigsa.replace_linears(make_llama()), nameless)
    young = shutil.copytree(talking_run, tmp_path / "young", ignore=shutil.ignore_patterns("done"))
    before = {path: path.stat().st_mtime_ns for path in base.iterdir()}
    for arguments, message in [
        ([folder, "--out", base], f"{base}: expected a folder that is not there yet"),
        ([folder, "--out", out, "--level", "1"], "--level: expected none for"),
        ([folder, "--out", out, "--base", tmp_path / "nowhere"], "nowhere: cannot be loaded"),
        ([folder, "--out", out, "--base", talking_run.parent / "model"], "that can be loaded here"),
        ([nameless, "--out", out], "does not name its base model; give it with --base"),
        ([talking_run, "--out", out, "--level", "7"], "--level: expected a finished level"),
        ([talking_run, "--out", out, "--base", base], "--base: expected none for"),
        ([young, "--out", out], "has no finished level"),
        ([tmp_path, "--out", out], "config.json is missing"),
    ]:
        assert message in failure(["merge", *arguments], capsys)
        assert not out.exists()
    assert {path: path.stat().st_mtime_ns for path in base.iterdir()} == before
    assert not list(tmp_path.glob(".*.part"))


def test_a_folder_is_there_as_a_whole_or_not_at_all(tmp_path):
    def failing(folder):
        (folder / "part").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(rigsa.RigsaError, match=r"cannot write .*: No space left on device"):
        write_folder(tmp_path / "new", failing)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    for name in ("link", "file"):
        with pytest.raises(rigsa.RigsaError, match="expected nothing there"):
            write_folder(tmp_path / name, os.listdir)


def test_runs_and_adapters_are_compared_in_a_table_and_a_figure(talking_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = rigsa.replace_linears(make_llama(), density=0.2)
    rigsa.save_adapter(model, "adapter")
    experiment = Experiment.prepare(load(talking_run), talking_run)
    experiment.attach()
    experiment.restore(1)
    ticket = inspection.patterns_of(experiment.model)
    assert main(["inspect", str(talking_run), "adapter"]) == 0
    shown = capsys.readouterr().out
    share = rigsa.overlap(ticket, "adapter").share
    assert f"{talking_run}/level_1 and adapter share {share:.2%} of their entries" in shown
    assert f"{inspection.density(ticket):.2%}" in shown.split("all layers")[1]
    assert "100.00%" in shown
    assert (tmp_path / "tickets.png").read_bytes().startswith(b"\x89PNG")
    assert main(["inspect", str(talking_run / "level_1"), "--out", "one.svg"]) == 0
    assert b"<svg" in (tmp_path / "one.svg").read_bytes()


def test_what_cannot_be_compared_is_one_message(talking_run, tmp_path, capsys):
    rigsa.save_adapter(rigsa.replace_linears(make_llama(), "*q_proj"), tmp_path / "other")
    damaged = shutil.copytree(talking_run, tmp_path / "run") / "level_1"
    metrics = json.loads((damaged / "metrics.json").read_text())
    name = next(iter(metrics["layer_density"]))
    metrics["layer_density"][name] /= 3
    (damaged / "metrics.json").write_text(json.dumps(metrics))
    figure = tmp_path / "figure.png"
    for arguments, message in [
        ([talking_run, tmp_path / "other"], "expected the model's gated layers"),
        ([tmp_path / "nowhere"], "nowhere: no such folder"),
        ([damaged], "does not fit metrics.json beside it"),
        ([talking_run, "--out", tmp_path / "figure.nothing"], "not supported"),
    ]:
        options = [] if "--out" in arguments else ["--out", figure]
        assert message in failure(["inspect", *arguments, *options], capsys)
    assert not figure.exists()


def run_of(method, model, out):
    pytest.importorskip("peft")
    options = ["--preset", "smoke", "--model", str(model), "--dtype", "float32", "--device", "cpu", "--no-drift"]
    images = ["--test-examples", "20", "--train-examples", "40", "--max-steps", "4"]
    rank = ["--rank", "2", *(["--density", "0.1", "--mask-examples", "4"] if method == "rosa" else [])]
    assert main([method, *options, *images, *rank, "--out", str(out)]) == 0
    return out


def test_both_halves_of_rosa_are_merged_and_an_adapter_of_peft_alone_is_refused(small_model_folder, tmp_path, capsys):
    run = run_of("rosa", small_model_folder, tmp_path / "rosa")
    assert main(["merge", str(run), "--out", str(tmp_path / "merged")]) == 0
    experiment = Experiment.prepare(load(run), run)
    experiment.attach()
    experiment.restore(1)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation=experiment.config.attention)
    assert not [name for name, _ in plain.named_parameters() if "lora" in name]
    torch.testing.assert_close(logits(plain), logits(experiment.model), rtol=1e-4, atol=1e-5)
    lora = run_of("lora", small_model_folder, tmp_path / "lora")
    assert "expected a run of gated layers, got one of lora" in failure(
        ["merge", lora, "--out", tmp_path / "x"], capsys
    )
    assert "expected a level of gated layers" in failure(["inspect", lora, "--out", tmp_path / "x.png"], capsys)
