"""An adapter is not lost when only `rigsa_kernels` was imported."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch.nn as nn

from rigsa_kernels import replace_linears, restore_linears

WITHOUT_RIGSA = """
import sys
from conftest import make_llama
from rigsa_kernels import gated_linears, merge_linears, replace_linears

folder = sys.argv[1]
model = replace_linears(make_llama(), density=0.3, alpha_init=0.5)
assert "rigsa" not in sys.modules
around = make_llama()
replace_linears(around.model)
for one in (model, __import__("copy").deepcopy(model), around):
    try:
        one.save_pretrained(folder)
    except RuntimeError as error:
        assert "the adapter of this model would be lost" in str(error) and "import rigsa" in str(error)
    else:
        raise SystemExit("saved without its adapter")

import rigsa

model.save_pretrained(folder)
again = make_llama()
rigsa.load_adapter(again, folder)
assert all((one.rigsa_values == other.rigsa_values).all()
           for one, other in zip(gated_linears(model).values(), gated_linears(again).values(), strict=True))
merge_linears(model).save_pretrained(folder + "/merged")
"""


def test_a_model_of_transformers_is_not_saved_until_rigsa_is_there(tmp_path):
    command = [sys.executable, "-c", WITHOUT_RIGSA, str(tmp_path)]
    tests = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, cwd=tests, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "merged" / "model.safetensors").exists()


@pytest.mark.parametrize("order", ["import rigsa, rigsa_kernels", "import rigsa_kernels, rigsa"])
def test_whichever_package_was_imported_first_an_adapter_is_saved(order, tmp_path):
    code = f"""
{order}
from conftest import make_llama
model = rigsa_kernels.replace_linears(make_llama(), density=0.3)
model.save_pretrained({str(tmp_path)!r})
"""
    tests = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=tests, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "rigsa_config.json").exists()


class Saved(nn.Sequential):
    """With a method of its own that knows nothing of adapters, such as other libraries' models have."""

    def save_pretrained(self, folder):
        return f"saved to {folder}"


def test_nor_is_one_that_rigsa_cannot_save():
    import rigsa  # noqa: F401

    model = replace_linears(Saved(nn.Linear(8, 4)))
    for one in (model, copy.deepcopy(model)):
        with pytest.raises(RuntimeError, match=r"write rigsa\.save_adapter\(model, folder\)"):
            one.save_pretrained("folder")
    assert restore_linears(model).save_pretrained("folder") == "saved to folder"
    assert "save_pretrained" not in replace_linears(nn.Sequential(nn.Linear(8, 4))).__dict__
