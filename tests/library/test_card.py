"""The model card: its head is what hubs read, its code loads the adapter, its intervals are Wilson's."""

import re

import pytest
import torch
from huggingface_hub import ModelCard
from peft import get_peft_model
from scipy.stats import binomtest
from transformers import AutoModelForCausalLM

from conftest import make_llama
from rigsa import Measured, RigsaConfig, export_adapter, gated_linears, prune, replace_linears, write_card
from rigsa.card import share

IDS = torch.tensor([[1, 5, 9, 2, 7, 3]])


@pytest.mark.parametrize("to", ["supertuning", "shira", "safetensors", "merged", "peft"])
def test_the_code_on_the_card_loads_the_adapter(tmp_path, to):
    make_llama().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    folder = tmp_path / "adapter"
    if to == "peft":
        model = get_peft_model(model, RigsaConfig(density=0.2, alpha_init=0.3))
        model.save_pretrained(folder)
        assert "Nothing was measured" in (folder / "README.md").read_text()
    else:
        model = replace_linears(model, density=0.2, alpha_init=0.3)
        export_adapter(model, folder, to)
    measured = {"accuracy": share(92.0, 300), "loss": Measured(0.25)}
    write_card(model, folder, to, data="digits", measured=measured, licence="apache-2.0")
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model == str(tmp_path / "base")
    assert card.data.license == "apache-2.0"
    assert card.data.library_name == {"safetensors": "rigsa", "merged": "transformers"}.get(to, "peft")
    assert "| accuracy | 92 (88.37 to 94.57) % |" in card.text
    assert "| loss | 0.25 |" in card.text
    free = sum(layer.rigsa_values.numel() for layer in gated_linears(model).values())
    assert f"{free:,} trained entries" in card.text
    blocks = re.findall(r"^```python\n(.*?)^```", card.text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == (2 if to in ("supertuning", "shira") else 1)
    for block in blocks:
        names = {}
        exec(block.replace("FOLDER", str(folder)), names)
        with torch.no_grad():
            found, expected = names["model"].eval()(IDS).logits, model.eval()(IDS).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_peft_saves_a_card_of_ours_and_leaves_one_that_somebody_wrote(tmp_path):
    """It says what is saved now, its code loads it, and the head that PEFT writes for hubs is kept."""
    make_llama().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(model, RigsaConfig(alpha_init=0.3, task_type="CAUSAL_LM"))
    model.add_adapter("other", RigsaConfig(density=0.1, alpha_init=0.3, task_type="CAUSAL_LM"))
    folder, file = tmp_path / "adapter", tmp_path / "adapter" / "README.md"
    model.save_pretrained(folder)
    assert "100.00% of the weights of 14 layers" in file.read_text()
    assert re.search(r"10\.0\d% of the weights of 14 layers", (folder / "other" / "README.md").read_text())
    prune(model, 0.5, "large_final")
    model.save_pretrained(folder)
    card = ModelCard.load(file)
    assert "50.00% of the weights of 14 layers" in card.text
    assert card.text.count("# adapter") == 1
    assert {"rigsa", "sparse-adapter"} <= set(card.data.tags)
    assert card.data.library_name == "peft"
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.base_model == str(tmp_path / "base")
    names = {}
    exec(re.findall(r"^```python\n(.*?)^```", card.text, re.M | re.S)[0].replace("FOLDER", str(folder)), names)
    with torch.no_grad():
        assert torch.equal(names["model"].eval()(IDS).logits, model.eval()(IDS).logits)
    file.write_text("---\nlicense: mit\n---\n\n# My own words\n")
    model.save_pretrained(folder)
    assert "My own words" in file.read_text()
    assert "of the weights of" not in file.read_text()


@pytest.mark.parametrize(("right", "count"), [(0, 20), (20, 20), (17, 300), (1, 1)])
def test_intervals_are_wilsons(right, count):
    found, expected = share(100 * right / count, count), binomtest(right, count).proportion_ci(method="wilson")
    assert found.low == pytest.approx(100 * expected.low, abs=1e-4)
    assert found.high == pytest.approx(100 * expected.high, abs=1e-4)
