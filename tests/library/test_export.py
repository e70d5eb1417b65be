"""Adapters for plain PEFT, tried in a process that cannot import rigsa, and adapters of plain PEFT for us."""

import json
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn as nn
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

pytest.importorskip("peft", minversion="0.21")

from peft import PeftModel, ShiraConfig, SupertuningConfig, get_peft_model

from conftest import make_llama
from rigsa import (
    MaskedAdamW,
    RigsaConfig,
    RigsaError,
    export_adapter,
    gated_linears,
    import_adapter,
    load_adapter,
    prune,
    replace_linears,
    save_adapter,
)
from rigsa.export import _sparsity

IDS = torch.tensor([[1, 5, 9, 2, 7, 3]])
PLAIN = textwrap.dedent("""
    import sys

    class Refuse:
        def find_spec(self, name, *_):
            if name.partition(".")[0] in ("rigsa", "rigsa_kernels"):
                raise ImportError(f"{name} is not to be had here")

    sys.meta_path.insert(0, Refuse())
    import torch
    from peft import AutoPeftModelForCausalLM, PeftModel
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    base, out, *folders = sys.argv[1:]
    ids = torch.tensor([[1, 5, 9, 2, 7, 3]])
    found = {}
    for number, folder in enumerate(folders):
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder, is_trainable=True)
        with torch.no_grad():
            found[f"{number} loaded"] = model.eval()(input_ids=ids).logits
            found[f"{number} auto"] = AutoPeftModelForCausalLM.from_pretrained(folder).eval()(input_ids=ids).logits
        if "supertuning" in folder:  # transformers' own loader drops SHiRA's indices
            other = AutoModelForCausalLM.from_pretrained(base)
            other.load_adapter(folder)
            with torch.no_grad():
                found[f"{number} transformers"] = other.eval()(input_ids=ids).logits
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        before = model(input_ids=ids, labels=ids).loss
        before.backward()
        torch.optim.AdamW(trained, lr=1e-2).step()
        assert model(input_ids=ids, labels=ids).loss < before
        with torch.no_grad():
            found[f"{number} merged"] = PeftModel.from_pretrained(
                AutoModelForCausalLM.from_pretrained(base), folder
            ).merge_and_unload()(input_ids=ids).logits
    assert not any(name.startswith("rigsa") for name in sys.modules)
    save_file(found, out)
""")


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def set_values(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in gated_linears(model).values():
            layer.rigsa_values.copy_(torch.randn(layer.rigsa_values.shape, generator=generator))
            layer.rigsa_alpha.fill_(0.07)
    return model


def native(base, **options):
    return set_values(replace_linears(AutoModelForCausalLM.from_pretrained(base), **options))


def under_peft(base, **options):
    return set_values(get_peft_model(AutoModelForCausalLM.from_pretrained(base), RigsaConfig(**options)))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "base"
    make_llama().save_pretrained(folder)
    return folder


def test_plain_peft_loads_merges_and_trains_what_was_exported(base, tmp_path):
    """Every density, a global ranking, whose densities differ by layer, and a head that is trained beside."""
    unequal = native(base)
    prune(unequal, 0.2, "large_final", ranking="global", rewind="none")
    with_head = replace_linears(AutoModelForCausalLM.from_pretrained(base), density=0.1, modules_to_save=["lm_head"])
    with torch.no_grad():
        with_head.lm_head.weight += 0.01
    models = {
        "supertuning-3": native(base, density=0.03), "supertuning-50": native(base, density=0.5),
        "supertuning-100": native(base), "supertuning-unequal": unequal, "supertuning-head": set_values(with_head),
        "supertuning-peft": under_peft(base, density=0.2), "shira-3": native(base, density=0.03),
        "shira-30": native(base, density=0.3), "shira-peft": under_peft(base, density=0.2),
    }  # fmt: skip
    expected, folders = [], []
    for name, model in models.items():
        state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        export_adapter(model, tmp_path / name, name.partition("-")[0])
        assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
        assert {path.name for path in (tmp_path / name).iterdir()} == {
            "adapter_config.json",
            "adapter_model.safetensors",
        }
        expected.append(logits(model))
        folders.append(str(tmp_path / name))
    out = tmp_path / "out.safetensors"
    found = subprocess.run(
        [sys.executable, "-c", PLAIN, str(base), str(out), *folders], capture_output=True, text=True, cwd=tmp_path
    )
    assert found.returncode == 0, found.stderr[-3000:]
    for name, tensor in load_file(out).items():
        assert (tensor - expected[int(name.split()[0])]).abs().max() <= 1e-6, name


@pytest.mark.parametrize("make", [native, under_peft])
@pytest.mark.parametrize("density", [None, 0.2])
def test_a_merged_folder_in_16_bits_has_the_bits_of_a_layer_that_composed(base, tmp_path, make, density):
    """What converters of other programs are given: plain transformers loads it, in the dtype that it was saved in."""
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    model = make(tmp_path / "base", density=density, numerics="composed")
    export_adapter(model, tmp_path / "plain", "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert plain.dtype == torch.bfloat16
    assert plain.state_dict().keys() == AutoModelForCausalLM.from_pretrained(base).state_dict().keys()
    assert torch.equal(logits(plain), logits(model))
    assert {"config.json", "model.safetensors"} <= {path.name for path in (tmp_path / "plain").iterdir()}


def test_a_merged_model_is_plain_and_the_adapted_one_stays(base, tmp_path):
    for number, model in enumerate((native(base, density=0.2), native(base), under_peft(base, density=0.2),
                                    under_peft(base, density=0.2, modules_to_save=["lm_head"]))):  # fmt: skip
        if number == 3:
            with torch.no_grad():
                model.base_model.model.lm_head.modules_to_save["default"].weight.add_(0.1)
        before = logits(model)
        export_adapter(model, tmp_path / str(number), "merged")
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / str(number))), before)
        assert torch.equal(logits(model), before)


@pytest.mark.parametrize("make", [native, under_peft])
def test_a_merged_model_is_written_as_a_whole_or_not_at_all_and_never_over_another(base, tmp_path, make, monkeypatch):
    model = make(base, density=0.2)
    before = logits(model)
    here = {path: path.read_bytes() for path in base.iterdir()}
    with pytest.raises(RigsaError, match="expected a folder that is not there yet"):
        export_adapter(model, base, "merged")
    assert {path: path.read_bytes() for path in base.iterdir()} == here

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(transformers.PretrainedConfig, "save_pretrained", full)
    with pytest.raises(RigsaError, match="No space left"):
        export_adapter(model, tmp_path / "new", "merged")
    assert [path.name for path in tmp_path.iterdir()] == []
    assert torch.equal(logits(model), before)


def test_our_own_format_loads_onto_a_bare_model(base, tmp_path):
    model = under_peft(base, density=0.2)
    export_adapter(model, tmp_path, "safetensors")
    bare = AutoModelForCausalLM.from_pretrained(base)
    load_adapter(bare, tmp_path, strict=True)
    assert torch.equal(logits(bare), logits(model))


@pytest.mark.parametrize("to", ["supertuning", "shira"])
def test_out_and_in_again(base, tmp_path, to):
    model = native(base, density=0.2)
    export_adapter(model, tmp_path, to)
    again = AutoModelForCausalLM.from_pretrained(base)
    import_adapter(again, tmp_path)
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-6)
    assert all(layer.rigsa_alpha.item() == 1 for layer in gated_linears(again).values())


@pytest.mark.parametrize("to", ["supertuning", "shira"])
def test_a_layer_with_fewer_entries_is_filled_up_with_zeros_at_its_first_frozen_places(base, tmp_path, to):
    """Every layer has as many entries as PEFT computes from its one number, and no difference where it had none."""
    model = native(base)
    prune(model, 0.2, "large_final", ranking="global", rewind="none")
    export_adapter(model, tmp_path, to)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    filled = []
    for name, layer in gated_linears(model).items():
        rows, columns = layer.pattern.shape
        count = (
            int(rows * columns * (1 - config["sparsity"])) if to == "supertuning" else config["r"] * (rows + columns)
        )
        places = tensors[f"base_model.model.{name}.{to}_indices"].long()
        places = places if to == "supertuning" else places[0] * columns + places[1]
        values = tensors[f"base_model.model.{name}.{'supertuning_values' if to == 'supertuning' else 'shira_weight'}"]
        free = layer.pattern.to_mask().flatten()
        more = (~free).nonzero().view(-1)[: count - layer.pattern.nnz]
        expected = torch.cat([free.nonzero().view(-1), more]).sort().values
        assert torch.equal(places, expected)
        difference = layer.delta().flatten() * layer.rigsa_alpha
        assert torch.equal(values[torch.isin(places, more)], torch.zeros(len(more)))
        torch.testing.assert_close(values, difference[places].detach(), rtol=1e-6, atol=0)
        filled.append(len(more))
    assert min(filled) < max(filled)


def supertuning():
    return SupertuningConfig(target_modules=["q_proj", "up_proj"], sparsity=0.9, task_type="CAUSAL_LM")


def shira():
    return ShiraConfig(target_modules=["q_proj", "up_proj"], r=2, random_seed=3, task_type="CAUSAL_LM")


def rigsa():
    return RigsaConfig(density=0.1, alpha_init=0.3, seed=5, task_type="CAUSAL_LM", modules_to_save=["lm_head"])


@pytest.fixture(params=[supertuning, shira, rigsa])
def of_peft(request, base, tmp_path):
    """A folder that PEFT saved, and its model's logits."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), request.param())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(
                    torch.full_like(parameter, 0.01) if "alpha" in name else torch.randn_like(parameter) * 0.1
                )
    model.save_pretrained(tmp_path)
    return tmp_path, logits(model)


def test_an_adapter_of_peft_becomes_a_gated_one(base, of_peft):
    folder, expected = of_peft
    model = AutoModelForCausalLM.from_pretrained(base)
    import_adapter(model, folder)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-6)
    model(input_ids=IDS, labels=IDS).loss.backward()
    MaskedAdamW(model, lr=1e-2).step()
    assert not torch.equal(logits(model), expected)
    prune(model, 0.5, "large_final", rewind="none")
    with pytest.raises(ValueError, match="bare base model"):
        import_adapter(model, folder)


def test_a_folder_that_is_missing_or_of_the_other_kind_is_said_with_what_reads_it(base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base)
    for load in load_adapter, import_adapter:
        with pytest.raises(RigsaError, match="there is no such folder"):
            load(model, tmp_path / "nowhere")
    save_adapter(replace_linears(AutoModelForCausalLM.from_pretrained(base)), tmp_path)
    with pytest.raises(RigsaError, match=r"save_adapter wrote it .* rigsa\.load_adapter"):
        import_adapter(model, tmp_path)


def damage(key, change):
    def apply(folder):
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        name = next(name for name in tensors if name.endswith(key))
        save_file(change(dict(tensors), name), path)

    return apply


def configured(**options):
    def apply(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | options))

    return apply


def pickled(folder):
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


DAMAGES = {
    "outside": (damage("indices", lambda t, n: t | {n: t[n] + 10**6}), "outside of"),
    "negative": (damage("indices", lambda t, n: t | {n: t[n] - 10**6}), "outside of"),
    "too few": (damage("indices", lambda t, n: t | {n: t[n][1:].contiguous()}), "a place for each value"),
    "none": (damage("indices", lambda t, n: {k: v for k, v in t.items() if k != n}), "save_precomputed_indices"),
    "NaN": (damage("values", lambda t, n: t | {n: t[n] * float("nan")}), "finite"),
    "another layer": (
        damage("values", lambda t, n: t | {"base_model.model.x.supertuning_values": t[n] + 1}),
        "no linear layer",
    ),
    "beside": (damage("values", lambda t, n: t | {"base_model.model.y.weight": t[n].clone()}), "no parameter"),
    "method": (configured(peft_type="LORA"), "got 'LORA'"),
    "hybrid": (configured(r=4), "low-rank part"),
    "pickle": (pickled, "pickle, which is never read"),
    "cut": (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"\x00" * 9), "not an adapter"),
    "no config": (lambda folder: (folder / "adapter_config.json").unlink(), "it has no adapter_config.json"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_adapter_of_peft_is_refused(base, tmp_path, name):
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), supertuning()).save_pretrained(tmp_path)
    change, message = DAMAGES[name]
    change(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(base)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(RigsaError, match=message):
        import_adapter(model, tmp_path)
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    assert not gated_linears(model)


def test_load_adapter_says_what_to_write_for_a_folder_of_peft(base, tmp_path):
    under_peft(base, density=0.2).save_pretrained(tmp_path)
    with pytest.raises(RigsaError, match=r"write rigsa\.import_adapter\(model, folder\)"):
        load_adapter(AutoModelForCausalLM.from_pretrained(base), tmp_path)


def test_what_a_format_has_no_room_for_is_refused(base, tmp_path):
    with pytest.raises(RigsaError, match=r"the densest needs \d+, and .* has room for \d+ at most; use 'supertuning'"):
        export_adapter(native(base), tmp_path, "shira")
    with pytest.raises(ValueError, match="to: expected one of supertuning"):
        export_adapter(native(base), tmp_path, "onnx")
    with pytest.raises(ValueError, match="expected gated sparse layers"):
        export_adapter(make_llama(), tmp_path, "shira")
    with pytest.raises(RigsaError, match="models of transformers"):
        export_adapter(replace_linears(nn.Sequential(nn.Linear(4, 4))), tmp_path, "merged")
    broken = native(base)
    with torch.no_grad():
        next(iter(gated_linears(broken).values())).rigsa_alpha.fill_(float("inf"))
    with pytest.raises(RigsaError, match="finite"):
        export_adapter(broken, tmp_path, "supertuning")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "counts", [[(1, 3)], [(7, 7)], [(31, 1024), (49, 1536)], [(55_714_922, 1_610_612_736)], [(1, 10**9)]]
)
def test_the_share_of_zeros_leaves_every_layer_its_entries(counts):
    sparsity = json.loads(json.dumps(_sparsity(counts)))
    assert 0 <= sparsity < 1
    for entries, weights in counts:
        kept = int(weights * (1 - sparsity))
        assert entries <= kept <= weights
    assert any(kept - entries <= 1 for entries, kept in ((e, int(w * (1 - sparsity))) for e, w in counts))


def test_plain_peft_goes_on_where_the_import_came_from(base, tmp_path):
    """The round trip through PEFT's own class, in this process."""
    model = native(base, density=0.2)
    export_adapter(model, tmp_path, "shira")
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-6)
