"""The page of the library runs, block after block, in an empty folder."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset
from transformers import LlamaForCausalLM

import rigsa
from conftest import WORDS, make_llama

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "library.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


class Sentences(Dataset):
    ids = torch.arange(16 * 8).view(16, 8) % len(WORDS)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, place):
        return {"input_ids": self.ids[place], "labels": self.ids[place]}


def test_every_block_of_the_page_runs(tmp_path, monkeypatch, capsys):
    pytest.importorskip("bitsandbytes")
    monkeypatch.chdir(tmp_path)
    make_llama(hidden_size=64, intermediate_size=96).save_pretrained("base")
    ids = Sentences.ids[:4]
    names = {"BASE": "base", "batches": [{"input_ids": ids, "labels": ids}] * 2, "dataset": Sentences()}
    for number, block in enumerate(BLOCKS):
        exec(compile(block, f"docs/library.md, block {number}", "exec"), names)
    printed = capsys.readouterr().out
    assert printed.count("prune(keep_fraction=0.8, criterion='rigsa'") == 4
    trained = [{name: tensor for name, tensor in names[model].state_dict().items()} for model in ("fresh", "again")]
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])
    assert (tmp_path / "adapter-4bit" / "rigsa_config.json").exists()


def test_the_block_that_loads_is_all_that_a_new_process_needs(tmp_path):
    make_llama().save_pretrained(tmp_path / "base")
    model = rigsa.replace_linears(LlamaForCausalLM.from_pretrained(tmp_path / "base"), density=0.3, alpha_init=0.5)
    rigsa.save_adapter(model, tmp_path / "adapter")
    (block,) = (block for block in BLOCKS if "import load_adapter\n" in block)
    code = (
        f"BASE = 'base'\n{block}\nimport torch\n"
        f"torch.save(fresh(torch.tensor({Sentences.ids[:4].tolist()})).logits.detach(), 'logits')"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "logits"), model(Sentences.ids[:4]).logits)


def test_help_shows_the_public_names_on_one_page():
    page = rigsa.__doc__
    assert len(page.splitlines()) < 60
    for name in rigsa.__all__:
        assert getattr(rigsa, name) is not None
        assert f"{name}" in page or name == "__version__", name
    assert sorted(rigsa.__all__) == rigsa.__all__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        rigsa.nothing  # noqa: B018


def test_importing_the_library_imports_no_transformers():
    code = "import sys, rigsa; print({'transformers', 'matplotlib', 'peft', 'numpy.random'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "transformers" not in found.stdout
    assert "matplotlib" not in found.stdout
