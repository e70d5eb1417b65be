"""The model card: its head is what hubs read, its code loads the adapter, its intervals are Wilson's."""

import re

import pytest
import torch
from huggingface_hub import ModelCard
from scipy.stats import binomtest
from transformers import AutoModelForCausalLM

from conftest import make_llama
from rigsa import export_adapter, gated_linears, replace_linears
from rigsa.card import Measured, share, write_card

IDS = torch.tensor([[1, 5, 9, 2, 7, 3]])


@pytest.mark.parametrize("to", ["supertuning", "shira", "safetensors", "merged"])
def test_the_code_on_the_card_loads_the_adapter(tmp_path, to):
    make_llama().save_pretrained(tmp_path / "base")
    model = replace_linears(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), density=0.2, alpha_init=0.3)
    folder = tmp_path / "adapter"
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
    assert len(blocks) == (1 if to in ("safetensors", "merged") else 2)
    for block in blocks:
        names = {}
        exec(block.replace("FOLDER", str(folder)), names)
        with torch.no_grad():
            found, expected = names["model"].eval()(IDS).logits, model.eval()(IDS).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("right", "count"), [(0, 20), (20, 20), (17, 300), (1, 1)])
def test_intervals_are_wilsons(right, count):
    found, expected = share(100 * right / count, count), binomtest(right, count).proportion_ci(method="wilson")
    assert found.low == pytest.approx(100 * expected.low, abs=1e-4)
    assert found.high == pytest.approx(100 * expected.high, abs=1e-4)
