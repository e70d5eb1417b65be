"""``rigsa export``: the adapter of a run in the formats that others load."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rigsa import import_adapter, load_adapter
from rigsa.experiments.config_file import load
from rigsa.run import main

IDS = torch.tensor([[1, 5, 9, 2, 7, 3]])


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


def restored(run, level):
    from rigsa.experiments.experiment import Experiment

    experiment = Experiment.prepare(load(run), run)
    experiment.attach()
    experiment.restore(level)
    return experiment.model


@pytest.fixture(scope="module")
def expected(talking_run):
    return logits(restored(talking_run, 1))


@pytest.mark.parametrize("to", ["supertuning", "shira", "safetensors", "merged"])
def test_the_last_level_of_a_run_is_exported(talking_run, expected, tmp_path, capsys, to):
    folder = tmp_path / to
    assert main(["export", str(talking_run), "--to", to, "--out", str(folder)]) == 0
    base = load(talking_run).model
    assert capsys.readouterr().out.strip().endswith(str(folder))
    if to == "merged":
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert AutoTokenizer.from_pretrained(folder).get_vocab() == AutoTokenizer.from_pretrained(base).get_vocab()
    else:
        model = AutoModelForCausalLM.from_pretrained(base)
        (load_adapter if to == "safetensors" else import_adapter)(model, folder)
    card = (folder / "README.md").read_text()
    assert card.startswith("---\n")
    assert "| accuracy on test images, 0-shot |" in card
    assert ("Without rigsa" in card) == (to != "safetensors")
    assert ("With rigsa" in card) == (to != "merged")
    assert (folder / "densities.png").stat().st_size > 1000
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)  # of logits of size 5


def test_a_merged_model_is_not_written_over_another_folder(talking_run, tmp_path, capsys):
    (tmp_path / "mine").touch()
    assert main(["export", str(talking_run), "--to", "merged", "--out", str(tmp_path)]) == 1
    assert f"{tmp_path}: expected a folder that is not there yet" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_an_earlier_level_goes_into_the_run_folder(talking_run, capsys):
    assert main(["export", str(talking_run), "--to", "safetensors", "--level", "0"]) == 0
    assert (talking_run / "export" / "safetensors" / "rigsa_config.json").exists()
    capsys.readouterr()
    assert main(["export", str(talking_run), "--to", "shira", "--level", "0"]) == 1  # too dense for a rank
    assert "use 'supertuning'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--level", "7"], "--level: expected a finished level of"),
        (["--level", "-1"], "--level"),
    ],
)
def test_a_level_that_is_not_there_is_one_line(talking_run, capsys, arguments, message):
    assert main(["export", str(talking_run), "--to", "merged", *arguments]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("method", ["lora", "shira"])
def test_a_run_of_a_method_of_peft_is_exported_to_peft_and_merged(method, tmp_path, small_model_folder, capsys):
    peft = pytest.importorskip("peft")
    run, base = tmp_path / "run", str(small_model_folder)
    assert main([
        method, "--preset", "smoke", "--model", base, "--dtype", "float32", "--device", "cpu", "--rank", "2",
        "--learning-rate", "0.05", "--test-examples", "20", "--train-examples", "40", "--no-drift",
        "--keep-trainable", "model.norm", "--out", str(run),
    ]) == 0  # fmt: skip
    trained = logits(restored(run, 0))
    assert (trained - logits(AutoModelForCausalLM.from_pretrained(base))).abs().max() > 0.01
    assert main(["export", str(run), "--to", method]) == 0
    adapted = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run / "export" / method)
    torch.testing.assert_close(logits(adapted), trained, rtol=1e-5, atol=1e-5)
    assert main(["export", str(run), "--to", "merged"]) == 0
    merged = AutoModelForCausalLM.from_pretrained(run / "export" / "merged")
    torch.testing.assert_close(logits(merged), trained, rtol=1e-4, atol=1e-5)
    for to in (method, "merged"):
        assert f"rigsa {method}, level 0" in (run / "export" / to / "README.md").read_text()
    capsys.readouterr()
    assert main(["export", str(run), "--to", "supertuning"]) == 1
    assert f"--to: expected {method} or merged for a run of {method}, got supertuning" in capsys.readouterr().err
    assert main(["export", str(run), "--to", method]) == 1
    assert "expected a folder that is not there yet" in capsys.readouterr().err
