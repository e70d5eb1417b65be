"""docs/peft.md: its blocks run, block after block, in an empty folder, and its tables name tests that there are."""

import json
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft", minversion="0.21")
pytest.importorskip("trl")

from benchmarks.adapter_size import rows
from conftest import make_llama, make_tokenizer

HERE = Path(__file__).resolve().parent
PAGE = (HERE.parents[1] / "docs" / "peft.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def test_every_block_of_the_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_llama(hidden_size=64, intermediate_size=96).save_pretrained("base")
    tokenizer = make_tokenizer()
    tokenizer.pad_token = "<unk>"
    tokenizer.save_pretrained("base")
    lines = [
        {"messages": [{"role": "user", "content": f"The digit is {n}"}, {"role": "assistant", "content": str(n)}]}
        for n in range(10)
    ]
    Path("chats.jsonl").write_text("\n".join(map(json.dumps, lines)))
    ids = torch.arange(16).view(2, 8)
    names = {"BASE": "base", "STEPS": 2, "batches": [{"input_ids": ids, "labels": ids}]}
    for number, block in enumerate(BLOCKS):
        exec(compile(block, f"docs/peft.md, block {number}", "exec"), names)
    assert "digit" in capsys.readouterr().out
    assert Path("adapter/adapter_config.json").exists()
    assert Path("lora/adapter_config.json").exists()
    with torch.no_grad():
        found, expected = (names[one].eval()(ids).logits for one in ("again", "model"))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_the_first_example_is_about_thirty_lines():
    assert len(BLOCKS[0].splitlines()) <= 32


def test_every_line_of_the_tables_is_a_test():
    tests = {name for path in HERE.glob("test_*.py") for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)}
    named = re.findall(r"`(test_\w+)` \|$", PAGE, re.MULTILINE)
    assert len(named) > 30
    assert set(named) <= tests


def test_a_file_is_within_two_per_cent_of_what_it_needs_and_smaller_than_other_sparse_methods():
    found = rows(layers=1)
    for density, method, trained, size, needed in found:
        if needed is not None:
            assert needed < size < 1.02 * needed, (density, method)
            sparse = [other for d, name, _, other, _ in found if d == density and name in ("SHiRA", "Super-Tuning")]
            assert len(sparse) == 2
            assert all(size < other for other in sparse)
            assert trained > 0
