"""RIGSA under PEFT: the cells of the table "works with" in docs/peft.md, one test each, and the refusals."""

import copy
import importlib.util
import json
import pickle
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, BertConfig, BertForSequenceClassification

pytest.importorskip("peft", minversion="0.21")

from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
)

from conftest import WORDS, make_llama
from rigsa import (
    MaskedAdamW,
    RigsaConfig,
    RigsaError,
    adapter_off,
    adapter_summary,
    gated_linears,
    gradient_ticket,
    load_adapter,
    magnitude_ticket,
    merge_linears,
    prune,
    random_ticket,
    replace_linears,
    restore_linears,
    restore_snapshot,
    restore_weights,
    rounding_losses,
    save_adapter,
    snapshot,
    verify_adapted,
)
from rigsa.peft_tuner.model import layers_of
from rigsa.state import adapted_layers, ticket_of
from rigsa.when_imported import when_imported

IDS = torch.tensor([[1, 5, 9, 2, 7, 3]])
ROWS = torch.arange(18).view(3, 6) % len(WORDS)
BATCHES = [{"input_ids": ROWS, "labels": ROWS}, {"input_ids": IDS, "labels": IDS}]
LAYERS = 14
"""Linear layers of the small Llama, but the head."""


def config(**options):
    return RigsaConfig(**{"density": 0.3, "alpha_init": 0.3, "task_type": "CAUSAL_LM"} | options)


def wrapped(name="default", base=make_llama, **options):
    return get_peft_model(base(), config(**options), name).eval()


def logits(model, ids=IDS, **others):
    with torch.no_grad():
        return model.eval()(input_ids=ids, **others).logits


def trained(model, steps=2):
    model.train()
    optimizer = MaskedAdamW(model, lr=1e-2)
    for _ in range(steps):
        model(input_ids=ROWS, labels=ROWS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def weights_of(model):
    return {
        name.replace("base_layer.", ""): tensor for name, tensor in model.state_dict().items() if "rigsa" not in name
    }


def assert_same_base(model):
    """The frozen weights have the bits of the base model."""
    expected = make_llama().state_dict()
    found = {name.removeprefix("base_model.model."): tensor for name, tensor in weights_of(model).items()}
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("options", [{}, {"density": None}, {"density": 0.03}, {"init": "magnitude"}, {"seed": 7}])
def test_the_adapter_is_the_one_that_replace_linears_makes(options):
    """The same entries, initial values, logits and gradients."""
    model = wrapped(**options).train()
    native = make_llama()
    init = options.pop("init", "random")
    replace_linears(native, **{"density": 0.3, "alpha_init": 0.3} | options)
    if init == "magnitude":
        magnitude_ticket(native, density=0.3)
    ours = adapted_layers(model)
    assert ours.keys() == gated_linears(native).keys()
    for one in (model, native.train()):
        one(input_ids=IDS, labels=IDS).loss.backward()
    for name, layer in gated_linears(native).items():
        assert torch.equal(ours[name].pattern.to_mask(), layer.pattern.to_mask())
        for part in ("rigsa_values", "rigsa_alpha"):
            assert torch.equal(getattr(ours[name], part), getattr(layer, part))
            assert torch.equal(getattr(ours[name], part).grad, getattr(layer, part).grad)
    assert torch.equal(logits(model), logits(native))


@pytest.mark.parametrize("tile", [None, "rows", 8])
@pytest.mark.parametrize("init", ["random", "magnitude", "gradient"])
def test_the_configuration_takes_the_ticket_that_the_library_takes(tmp_path, init, tile):
    """The same entries as the functions of the library choose, from the configuration alone, saved and loaded."""
    native = replace_linears(make_llama(), alpha_init=0.3)
    if init == "random":
        random_ticket(native, 0.3, tile=tile)
    elif init == "magnitude":
        magnitude_ticket(native, 0.3, tile=tile)
    else:
        gradient_ticket(native, lambda model, batch: model(**batch).loss, BATCHES, 0.3, tile=tile)
    model = wrapped(init=init, tile=tile, **({"batches": iter(BATCHES)} if init == "gradient" else {}))
    assert model.peft_config["default"].batches is None
    assert torch.equal(logits(model), logits(native))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_llama(), tmp_path)
    ours, theirs = adapted_layers(model), gated_linears(native)
    for name, layer in adapted_layers(loaded).items():
        assert layer.pattern.tile == ours[name].pattern.tile
        assert layer.pattern.equals(theirs[name].pattern)
        assert torch.equal(layer.rigsa_values, theirs[name].rigsa_values)


def test_a_gradient_ticket_for_a_second_adapter_leaves_the_first_as_it_was():
    model = trained(wrapped())
    next(iter(adapted_layers(model).values())).rigsa_alpha.requires_grad_(False)  # by hand
    before = logits(model)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    model.add_adapter("other", config(init="gradient", batches=BATCHES, density=0.1))
    assert torch.equal(logits(model), before)
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trainable
    model.set_adapter("other")
    assert torch.equal(logits(model), logits(wrapped(init="gradient", batches=BATCHES, density=0.1)))
    config_of_the_first = model.peft_config["other"]
    with pytest.raises(ValueError, match="they went with the first adapter"):
        get_peft_model(make_llama(), config_of_the_first)
    base = make_llama()
    kinds = [type(module) for module in base.modules()]
    with pytest.raises(ValueError, match="batches: expected at least one"):
        get_peft_model(base, config(init="gradient", batches=[]))
    assert [type(module) for module in base.modules()] == kinds


def test_trainable_names_carry_the_prefix_and_nothing_else_is_trained():
    model = wrapped()
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(names) == 2 * LAYERS
    assert all(".rigsa_adapter.default.rigsa_" in name for name in names)
    trainable, _ = model.get_nb_trainable_parameters()
    assert trainable == sum(layer.rigsa_values.numel() + 1 for layer in gated_linears(model).values())
    status = model.get_model_status()
    assert status.requires_grad == {"default": True}
    assert status.enabled
    assert status.num_adapter_layers == LAYERS
    assert "14 gated sparse layers" in adapter_summary(model)


def test_the_optimiser_has_the_gates_in_a_group_of_their_own():
    optimizer = MaskedAdamW(wrapped(), lr=1e-2, alpha_lr=1e-1)
    assert [(len(group["params"]), group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [
        (LAYERS, 1e-2, 1.0),
        (LAYERS, 1e-1, 0.0),
    ]


def peft_loader(base, folder):
    return PeftModel.from_pretrained(base, folder)


def lean_loader(base, folder):
    return PeftModel.from_pretrained(base, folder, low_cpu_mem_usage=True)


def transformers_loader(base, folder):
    base.load_adapter(folder)
    return base


LOADERS = {
    "PeftModel.from_pretrained": peft_loader,
    "low_cpu_mem_usage": lean_loader,
    "transformers load_adapter": transformers_loader,
}


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("density", [None, 0.5, 0.03])
def test_a_saved_adapter_is_loaded_to_the_bit(tmp_path, density, loader):
    model = trained(wrapped(density=density))
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }
    loaded = LOADERS[loader](make_llama(), tmp_path)
    assert torch.equal(logits(model), logits(loaded))
    for one, other in zip(gated_linears(model).values(), gated_linears(loaded).values(), strict=True):
        assert torch.equal(one.pattern.to_mask(), other.pattern.to_mask())
        assert one.rigsa_values.dtype == other.rigsa_values.dtype
        assert not other.rigsa_values.requires_grad
        one.set_pattern(one.pattern), other.set_pattern(other.pattern)
        assert torch.equal(one.rigsa_values, other.rigsa_values)  # the same initial values come back


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("tile", ["rows", "columns", 8, "5x12"])
def test_a_ticket_of_tiles_comes_back_as_tiles(tmp_path, tile, loader):
    model = wrapped(density=None)
    random_ticket(model, density=0.3, tile=tile)
    trained(model).save_pretrained(tmp_path)
    loaded = LOADERS[loader](make_llama(), tmp_path)
    assert torch.equal(logits(model), logits(loaded))
    for one, other in zip(gated_linears(model).values(), gated_linears(loaded).values(), strict=True):
        assert other.pattern.tile == one.pattern.tile is not None
        assert torch.equal(one.pattern.to_mask(), other.pattern.to_mask())


def test_a_tile_that_is_none_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    model = wrapped(density=None)
    random_ticket(model, density=0.3, tile=8)
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    key = "base_model.model.model.layers.0.mlp.up_proj.rigsa_adapter.rigsa_tile"
    for wrong, why in ([0, 8], "rows and columns of a tile"), ([4, 4], "rigsa_bits"), ([8, 9999], "rigsa_bits"):
        save_file(tensors | {key: torch.tensor(wrong, dtype=torch.int32)}, path)
        with pytest.raises(RigsaError, match=why):
            logits(PeftModel.from_pretrained(make_llama(), tmp_path))


@pytest.mark.parametrize(
    ("field", "value"),
    [("shape", [0, 3]), ("entries", 10**9), ("encoding", "tiles 0x3"), ("base", {"sample": "zz", "nf4": False})],
)
def test_a_layer_out_of_range_in_the_configuration_is_named_with_its_field(folder, field, value):
    path = folder / "adapter_config.json"
    saved = json.loads(path.read_text())
    saved["layers"]["model.layers.0.mlp.up_proj"][field] = value
    path.write_text(json.dumps(saved))
    with pytest.raises(ValueError, match=rf"up_proj: {field}: .* is out of range"):
        PeftConfig.from_pretrained(folder)


def test_a_loaded_adapter_is_trained_on_and_saved_again(tmp_path):
    model = trained(wrapped())
    model.save_pretrained(tmp_path / "one")
    loaded = PeftModel.from_pretrained(make_llama(), tmp_path / "one", is_trainable=True)
    before = logits(loaded)
    assert not torch.equal(before, logits(trained(loaded)))
    loaded.save_pretrained(tmp_path / "two")
    assert torch.equal(logits(loaded), logits(PeftModel.from_pretrained(make_llama(), tmp_path / "two")))


def test_auto_peft_model_and_auto_model_find_the_base(tmp_path):
    make_llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = trained(get_peft_model(base, config()))
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(model), logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")))
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")))


@pytest.mark.parametrize("tile", [None, 4, "rows", "3x8"])
def test_a_pruned_adapter_keeps_its_ticket_on_disk(tmp_path, tile):
    model = trained(wrapped(density=None))
    prune(model, keep_fraction=0.5, tile=tile)
    trained(model).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())["layers"]
    loaded = PeftModel.from_pretrained(make_llama(), tmp_path)
    assert torch.equal(logits(model), logits(loaded))
    for name, layer in adapted_layers(loaded).items():
        assert ticket_of(layer).level == 1
        assert saved[name]["entries"] == layer.pattern.nnz
        assert layer.pattern.equals(adapted_layers(model)[name].pattern)


def test_tickets_of_the_library_are_those_of_the_bare_model():
    model, native = wrapped(density=None), replace_linears(make_llama(), alpha_init=0.3)
    for one in (model, native):
        random_ticket(one, density=0.2, seed=3)
    for one, other in zip(gated_linears(model).values(), gated_linears(native).values(), strict=True):
        assert torch.equal(one.pattern.to_mask(), other.pattern.to_mask())
    report = gradient_ticket(model, lambda m, batch: m(input_ids=batch, labels=batch).loss, [ROWS], density=0.1)
    assert "model.layers.0.mlp.up_proj" in report.layers
    assert logits(model).isfinite().all()


def test_a_peft_model_and_a_bare_one_exchange_adapters(tmp_path):
    model = trained(wrapped(modules_to_save=["lm_head"]))
    save_adapter(model, tmp_path)
    bare = make_llama()
    load_adapter(bare, tmp_path, strict=True)
    assert torch.equal(logits(model), logits(bare))
    other = wrapped(seed=9, modules_to_save=["lm_head"])
    with pytest.raises(RigsaError, match="q_proj has other free entries"):
        load_adapter(other, tmp_path)
    load_adapter(other, tmp_path, replace=True)
    assert torch.equal(logits(model), logits(other))


def test_disabled_the_model_is_its_base_to_the_bit():
    model, base = trained(wrapped()), make_llama()
    logits(model)  # composes in place
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base))
        model.train()
        with torch.no_grad():
            assert torch.equal(model(input_ids=IDS).logits, base(input_ids=IDS).logits)
        model.eval()
    assert not torch.equal(logits(model), logits(base))


def test_the_base_passes_in_the_midst_of_a_step():
    """DPO's reference is computed between the forward and the backward pass."""
    model, other = wrapped().train(), wrapped().train()
    for one in (model, other):
        loss = one(input_ids=ROWS, labels=ROWS).loss
        if one is model:
            with one.disable_adapter(), torch.no_grad():
                assert torch.equal(one(input_ids=ROWS).logits, make_llama()(input_ids=ROWS).logits)
        loss.backward()
    for one, another in zip(gated_linears(model).values(), gated_linears(other).values(), strict=True):
        assert torch.equal(one.rigsa_values.grad, another.rigsa_values.grad)


def two_adapters():
    model = wrapped()
    model.add_adapter("other", config(seed=5, density=0.1))
    return model


def test_adapters_are_added_switched_and_deleted():
    model = two_adapters()
    assert not any(adapter.in_place for layer in layers_of(model) for adapter in layer.adapters.values())
    only = {"default": logits(wrapped()), "other": logits(wrapped(seed=5, density=0.1))}
    assert torch.equal(logits(model), only["default"])
    for name in ("other", "default", "other"):
        model.set_adapter(name)
        assert torch.equal(logits(model), only[name])
        trainable = {n for n, parameter in model.named_parameters() if parameter.requires_grad}
        assert len(trainable) == 2 * LAYERS
        assert all(f".{name}." in n for n in trainable)
        assert len(adapted_layers(model)) == LAYERS
    assert_same_base(model)
    model.delete_adapter("default")
    assert torch.equal(logits(model), only["other"])
    assert model.active_adapters == ["other"]
    with pytest.raises(ValueError, match="nothing"):
        model.delete_adapter("nothing")
    assert not any(".default" in name for name in model.state_dict())


def test_an_inactive_adapter_is_deleted():
    model = two_adapters()
    model.delete_adapter("other")
    assert torch.equal(logits(model), logits(wrapped()))
    assert all(layer.in_place for layer in gated_linears(model).values())  # alone again, it may compose in place
    assert_same_base(model)


def test_training_one_adapter_leaves_the_other():
    model = two_adapters()
    before = {n: p.clone() for n, p in model.named_parameters() if ".other." in n}
    trained(model)
    assert all(torch.equal(model.get_parameter(name), tensor) for name, tensor in before.items())


def test_selected_adapters_are_saved_and_loaded_by_name(tmp_path):
    model = two_adapters()
    model.save_pretrained(tmp_path, selected_adapters=["other"])
    assert {path.name for path in tmp_path.iterdir()} == {"other", "README.md"}
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_llama(), tmp_path)
    loaded.load_adapter(tmp_path / "other", "second")
    for mine, name in (("default", "default"), ("other", "second")):
        model.set_adapter(mine), loaded.set_adapter(name)
        assert torch.equal(logits(model), logits(loaded))
    with pytest.raises(ValueError, match="invalid `selected_adapters`"):
        model.save_pretrained(tmp_path, selected_adapters=["nothing"])


@pytest.mark.parametrize("names", [("adapter", "adapter_2"), ("a", "default_a"), ("proj", "q")])
def test_names_that_contain_each_other_stay_apart(tmp_path, names):
    first, second = names
    model = get_peft_model(make_llama(), config(), first)
    model.add_adapter(second, config(seed=5, density=0.1))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_llama(), tmp_path / first, adapter_name=first)
    loaded.load_adapter(tmp_path / second, second)
    for name in names:
        model.set_adapter(name), loaded.set_adapter(name)
        assert torch.equal(logits(model), logits(loaded))


@pytest.mark.parametrize("change", [replace_linears, restore_linears, merge_linears])
def test_what_works_in_place_of_layers_leaves_those_of_peft_alone(change):
    for model in (wrapped(), inject_adapter_in_model(config(), make_llama())):
        before = logits(model)
        with pytest.raises(ValueError, match="its adapters are PEFT's"):
            change(model)
        assert torch.equal(logits(model), before)


def test_the_library_reads_and_switches_a_peft_model():
    model = wrapped()
    before, taken = logits(model), snapshot(model)
    with adapter_off(model):
        assert torch.equal(logits(model), logits(make_llama()))
    trained(model)
    restore_snapshot(model, taken)
    assert torch.equal(logits(model), before)
    restore_weights(model)
    assert torch.equal(model.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight,
                       make_llama().model.layers[0].mlp.up_proj.weight)  # fmt: skip
    assert all(loss.updates for loss in rounding_losses(model).values())
    assert verify_adapted(model, input_ids=ROWS) == {}


@pytest.mark.parametrize("name", ["q_proj", "layers", "0"])
def test_a_name_that_is_a_modules_is_refused(name):
    model = wrapped()
    with pytest.raises(ValueError, match=f"adapter_name: '{name}' is part of the name of a module"):
        model.add_adapter(name, config())
    assert set(model.peft_config) == {"default"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("density", [None, 0.2])
def test_merged_it_computes_the_same_and_unmerged_the_base_is_back(dtype, density):
    model = wrapped(base=lambda: make_llama().to(dtype), density=density, numerics="composed", alpha_init=1.0)
    before = logits(model)
    model.merge_adapter()
    assert torch.equal(logits(model), before)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.merge_adapter()  # a second time it does nothing
    assert torch.equal(logits(model), before)
    model.unmerge_adapter()
    assert torch.equal(logits(model), before)
    base = make_llama().to(dtype).state_dict()
    found = {name.removeprefix("base_model.model."): tensor for name, tensor in weights_of(model).items()}
    assert all(torch.equal(found[name], tensor) for name, tensor in base.items())
    model.merge_adapter()
    plain = model.merge_and_unload()
    assert torch.equal(logits(plain), before)
    assert {type(module).__name__ for module in plain.modules() if "Linear" in type(module).__name__} == {"Linear"}


def test_a_merged_model_saves_and_loads_as_a_plain_one(tmp_path):
    model = trained(wrapped())
    before = logits(model)
    model.merge_and_unload(safe_merge=True).save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), before)


def test_several_adapters_are_merged_and_unmerged():
    model = two_adapters()
    expected = {}
    for name, layer in adapted_layers(model).items():
        expected[name] = layer.frozen_matrix() + layer.rigsa_alpha * layer.delta()
    model.set_adapter("other")
    for name, layer in adapted_layers(model).items():
        expected[name] = (expected[name] + layer.rigsa_alpha * layer.delta()).detach()
    model.set_adapter("default")
    model.merge_adapter(["default", "other"])
    found = weights_of(model)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[f"base_model.model.{name}.weight"], tensor)
    model.unmerge_adapter()
    assert_same_base(model)


def test_merging_and_unmerging_a_thousand_times_changes_nothing():
    model = get_peft_model(nn.Sequential(nn.Linear(6, 5)), RigsaConfig(density=0.5, alpha_init=0.3))
    weight = model.state_dict()["base_model.model.0.base_layer.weight"].clone()
    for _ in range(1000):
        model.merge_adapter()
        model.unmerge_adapter()
    assert torch.equal(model.state_dict()["base_model.model.0.base_layer.weight"], weight)


def test_unloaded_it_is_the_base():
    model = trained(wrapped())
    logits(model)  # composes in place
    assert torch.equal(logits(model.unload()), logits(make_llama()))


def test_switching_while_merged_unmerges():
    model = two_adapters()
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging"):
        model.set_adapter("other")
    assert torch.equal(logits(model), logits(wrapped(seed=5, density=0.1)))
    model.merge_adapter()
    with pytest.raises(ValueError, match="Cannot delete"):
        model.delete_adapter("other")


@pytest.mark.parametrize("part", ["rigsa_values", "rigsa_alpha"])
def test_what_is_not_finite_is_neither_merged_nor_saved(tmp_path, part):
    model = wrapped()
    with torch.no_grad():
        getattr(list(gated_linears(model).values())[3], part).view(-1)[0] = float("nan")
    for safe in (False, True):
        with pytest.raises(ValueError, match="not finite"):
            model.merge_adapter(safe_merge=safe)
    assert_same_base(model)
    with pytest.raises(RigsaError, match="finite"):
        model.save_pretrained(tmp_path)


def test_a_merge_that_rounding_would_lose_is_refused():
    model = wrapped(base=lambda: make_llama().bfloat16(), alpha_init=1e-6)
    with pytest.raises(ValueError, match=r"merge model\.float\(\)"):
        model.merge_and_unload()
    model.float().merge_and_unload()


def test_mixed_batches_compute_each_row_by_its_adapter():
    model = two_adapters()
    names = ["other", "__base__", "default"]
    found = logits(model, ROWS, adapter_names=names)
    singles = {"__base__": make_llama(), "default": wrapped(), "other": wrapped(seed=5, density=0.1)}
    for row, name in enumerate(names):
        torch.testing.assert_close(found[row : row + 1], logits(singles[name], ROWS[row : row + 1]))
    assert torch.equal(logits(model), logits(singles["default"]))
    with pytest.raises(ValueError, match="got 'nobody'"):
        logits(model, ROWS, adapter_names=["other", "nobody", "default"])
    with pytest.raises(ValueError, match="evaluation mode"):
        model.train()(input_ids=ROWS, adapter_names=names)
    with pytest.raises(ValueError, match="one for each of 3 rows"):
        logits(model, ROWS, adapter_names=["other"])


def test_a_mixed_batch_with_one_adapter_alternates_with_the_base():
    model = wrapped()
    for _ in range(2):
        found = logits(model, ROWS, adapter_names=["default", "__base__", "default"])
        torch.testing.assert_close(found[1:2], logits(make_llama(), ROWS[1:2]))
        torch.testing.assert_close(found[:1], logits(wrapped(), ROWS[:1]))
    model.merge_adapter()
    with pytest.raises(ValueError, match="neither merged nor disabled"):
        logits(model, ROWS, adapter_names=["default", "__base__", "default"])


def test_mixed_batches_generate():
    model = two_adapters()
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    found = model.generate(input_ids=ROWS, adapter_names=["other", "__base__", "default"], **options)
    assert torch.equal(found[1:2], make_llama().generate(input_ids=ROWS[1:2], **options))
    assert torch.equal(found[2:], wrapped().generate(input_ids=ROWS[2:], **options))


def test_several_active_adapters_are_refused_by_name():
    model = two_adapters()
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match=r"got default, other; make one of them with model\.add_weighted_adapter"):
        logits(model)


@pytest.mark.parametrize(("rule", "density"), [("linear", None), ("ties", 0.5)])
def test_adapters_are_combined_with_weights(tmp_path, rule, density):
    model = two_adapters()
    model.add_weighted_adapter(["default", "other"], [0.7, 0.5], "both", rule, density)
    expected = {}
    if rule == "linear":
        for weight, name in ((0.7, "default"), (0.5, "other")):
            model.set_adapter(name)
            for layer_name, layer in adapted_layers(model).items():
                part = (weight * layer.rigsa_alpha * layer.delta()).detach()
                expected[layer_name] = expected.get(layer_name, 0) + part
    model.set_adapter("both")
    for layer_name, layer in adapted_layers(model).items():
        assert layer.rigsa_alpha.item() == 1
        if rule == "linear":
            torch.testing.assert_close(layer.delta(), expected[layer_name])
    model.save_pretrained(tmp_path, selected_adapters=["both"])
    assert torch.equal(logits(model), logits(PeftModel.from_pretrained(make_llama(), tmp_path / "both")))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["default"], [1.0], "other"), "there already"),
        ((["default", "x"], [1.0, 1.0], "new"), "got 'x'"),
        ((["default"], [1.0, 2.0], "new"), "one for each"),
        ((["default"], [float("nan")], "new"), "finite"),
        ((["default"], [1.0], "new", "svd"), "linear or ties"),
        ((["default"], [-1.0], "new", "ties"), "above 0"),
        ((["default"], [1.0], "new", "ties", 2.0), "at most 1"),
        ((["default"], [1.0], "new", "linear", 0.5), "none for linear"),
    ],
)
def test_a_combination_that_cannot_be_made_is_refused(arguments, message):
    model = two_adapters()
    before = model.state_dict().keys()
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(*arguments)
    assert model.state_dict().keys() == before
    assert set(model.peft_config) == {"default", "other"}


def test_modules_to_save_are_trained_saved_and_loaded(tmp_path):
    model = trained(wrapped(modules_to_save=["lm_head"]))
    head = model.base_model.model.lm_head
    assert not torch.equal(head.modules_to_save["default"].weight, head.original_module.weight)
    model.save_pretrained(tmp_path)
    for loader in LOADERS.values():
        assert torch.equal(logits(model), logits(loader(make_llama(), tmp_path)))
    assert torch.equal(logits(model), logits(model.merge_and_unload()))


def test_a_classifier_has_its_head_trained(tmp_path):
    def bert():
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
        return BertForSequenceClassification(BertConfig(vocab_size=30, num_labels=3, **sizes))

    model = get_peft_model(bert(), RigsaConfig(density=0.2, alpha_init=0.3, task_type="SEQ_CLS"))
    model(input_ids=ROWS, labels=torch.tensor([0, 1, 2])).loss.backward()
    MaskedAdamW(model, lr=1e-2).step()
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(model), logits(PeftModel.from_pretrained(bert(), tmp_path)))


def test_a_model_that_is_not_of_transformers(tmp_path):
    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4, bias=False))

    model = get_peft_model(make(), RigsaConfig(target_modules=["0", "2"], density=0.5, alpha_init=0.3))
    x = torch.randn(3, 8)
    model.save_pretrained(tmp_path)
    assert torch.equal(model(x), PeftModel.from_pretrained(make(), tmp_path)(x))


def test_layers_are_selected_as_peft_selects_them():
    names = adapted_layers(wrapped(target_modules=["q_proj", "v_proj"], layers_to_transform=[1])).keys()
    assert set(names) == {"model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"}
    names = adapted_layers(wrapped(target_modules=r".*\.mlp\..*proj")).keys()
    assert len(names) == 6
    assert len(adapted_layers(wrapped(exclude_modules=["q_proj"]))) == 12


def test_transformers_adds_switches_and_deletes_adapters(tmp_path):
    model = make_llama()
    model.add_adapter(config(), "one")
    assert torch.equal(logits(model), logits(wrapped()))
    model.add_adapter(config(seed=5, density=0.1), "two")
    assert torch.equal(logits(model), logits(wrapped(seed=5, density=0.1)))
    model.set_adapter("one")
    model.disable_adapters()
    assert torch.equal(logits(model), logits(make_llama()))
    model.enable_adapters()
    model.save_pretrained(tmp_path)
    again = make_llama()
    again.load_adapter(tmp_path)
    assert torch.equal(logits(again), logits(wrapped()))
    model.delete_adapter("one")
    assert torch.equal(logits(model), logits(wrapped(seed=5, density=0.1)))


def test_injected_without_a_peft_model():
    model = inject_adapter_in_model(config(), make_llama())
    assert torch.equal(logits(model), logits(wrapped()))
    state = get_peft_model_state_dict(model)
    assert set(state) >= {"model.layers.0.mlp.up_proj.rigsa_adapter.rigsa_values"}


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    grads = []
    for checkpointing in (False, True):
        base = make_llama()
        if checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model = get_peft_model(base, config()).train()
        model(input_ids=ROWS, labels=ROWS, use_cache=False).loss.backward()
        grads.append([layer.rigsa_values.grad for layer in gated_linears(model).values()])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_generates_and_trains(dtype, tmp_path):
    model = wrapped(base=lambda: make_llama().to(dtype))
    assert {layer.rigsa_values.dtype for layer in gated_linears(model).values()} == {torch.float32}
    model.generate(input_ids=IDS, max_new_tokens=3, pad_token_id=0)
    if dtype == torch.bfloat16:
        trained(model)
    model.save_pretrained(tmp_path)
    for loader in LOADERS.values():
        assert torch.equal(logits(model), logits(loader(make_llama().to(dtype), tmp_path)))


def test_values_have_the_dtype_that_the_configuration_says(tmp_path):
    model = wrapped(values_dtype="bfloat16")
    assert {layer.rigsa_values.dtype for layer in gated_linears(model).values()} == {torch.bfloat16}
    assert {layer.rigsa_alpha.dtype for layer in gated_linears(model).values()} == {torch.float32}
    model.save_pretrained(tmp_path)
    for loader in LOADERS.values():
        loaded = loader(make_llama(), tmp_path)
        assert {layer.rigsa_values.dtype for layer in gated_linears(loaded).values()} == {torch.bfloat16}
        assert torch.equal(logits(model), logits(loaded))


def test_copies_and_pickles_stand_on_their_own():
    model = trained(wrapped())
    before = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), before)
        trained(other)
        assert torch.equal(logits(model), before)
        assert not torch.equal(logits(other), before)


def test_a_state_dict_shows_the_frozen_weights_and_stays_as_it_is():
    model = wrapped()
    logits(model)
    state = {name: tensor for name, tensor in model.state_dict().items() if "base_layer" in name}
    logits(model)
    base = make_llama().state_dict()
    for name, tensor in state.items():
        assert torch.equal(tensor, base[name.removeprefix("base_model.model.").replace("base_layer.", "")])


def test_a_model_moves_as_a_whole():
    model = wrapped()
    expected = logits(wrapped(base=lambda: make_llama().double(), values_dtype="float64"))
    logits(model)
    torch.testing.assert_close(logits(model.double()), expected, rtol=1e-5, atol=1e-5)


def test_input_embeddings_take_part():
    model = wrapped()
    embeds = model.get_input_embeddings()(IDS)
    assert torch.equal(model(inputs_embeds=embeds).logits, model(input_ids=IDS).logits)


def test_hooks_of_the_linear_layer_run():
    base, seen = make_llama(), []
    base.model.layers[0].mlp.up_proj.register_forward_hook(lambda module, args, y: seen.append(y.shape))
    model = get_peft_model(base, config())
    logits(model)
    with model.disable_adapter():
        logits(model)
    assert len(seen) == 2


@pytest.mark.parametrize("composed", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_a_model_is_compiled_as_one_graph(composed, training):
    def make():
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
        return get_peft_model(base, config(target_modules=["0", "2"], density=0.5, task_type=None)).train(training)

    model, other, x = make(), make(), torch.randn(3, 8)
    if composed:
        other(x)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    model(x).sum().backward()
    assert torch.equal(compiled(x), model(x))
    compiled(x).sum().backward()
    for one, another in zip(gated_linears(model).values(), gated_linears(other).values(), strict=True):
        torch.testing.assert_close(one.rigsa_values.grad, another.rigsa_values.grad)
    with other.disable_adapter(), model.disable_adapter():
        assert torch.equal(compiled(x), model(x))


def test_tied_weights_are_not_written_to():
    model = get_peft_model(make_llama(tie_word_embeddings=True), config(target_modules=["lm_head", "q_proj"]))
    before = model.get_input_embeddings().weight.clone()
    logits(model)
    assert torch.equal(model.get_input_embeddings().weight, before)


def test_a_base_in_four_bits_is_trained_and_refuses_to_merge(tmp_path):
    pytest.importorskip("bitsandbytes")
    from peft import prepare_model_for_kbit_training
    from transformers import BitsAndBytesConfig

    make_llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="bfloat16")

    def base():
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=four_bits)

    prepared = prepare_model_for_kbit_training(base(), use_gradient_checkpointing=True)
    model = trained(get_peft_model(prepared, config()))
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(prepare_model_for_kbit_training(base()), tmp_path / "adapter")
    assert torch.equal(logits(model), logits(loaded))
    with pytest.raises(ValueError, match="in four bits"):
        model.merge_and_unload()
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(prepare_model_for_kbit_training(base())))


@pytest.mark.parametrize("density", [None, 0.3])
@pytest.mark.parametrize("init", ["random", "magnitude", "gradient"])
def test_a_base_in_eight_bits_is_trained_and_refuses_to_merge(tmp_path, density, init):
    """The base computes its part as before, to the bit, and the adapter's product is added."""
    pytest.importorskip("bitsandbytes")
    from peft import prepare_model_for_kbit_training
    from transformers import BitsAndBytesConfig

    if init != "random" and density is None:
        pytest.skip("a ticket that is chosen has a density")
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    make_llama(**sizes).save_pretrained(tmp_path / "base")

    def base(**options):
        bits = BitsAndBytesConfig(load_in_8bit=True)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=bits)
        return prepare_model_for_kbit_training(loaded, **options)

    asked = {"batches": BATCHES} if init == "gradient" else {}
    model = get_peft_model(base(use_gradient_checkpointing=True), config(density=density, init=init, **asked))
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    adapter, x, seen = layer.adapters["default"], torch.randn(3, 64), []
    hook = layer.base_layer.register_forward_hook(lambda module, args, y: seen.append(y.shape))
    layer(x)
    assert len(seen) == 1
    hook.remove()
    added = adapter.rigsa_alpha * F.linear(x, adapter.delta())
    torch.testing.assert_close(layer(x), layer.base_layer(x) + added)
    trained(model)
    model.save_pretrained(tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the adapter was trained on another base")
        loaded = PeftModel.from_pretrained(base(), tmp_path / "adapter")
        bare = PeftModel.from_pretrained(make_llama(**sizes), tmp_path / "adapter")
    assert torch.equal(logits(model), logits(loaded))
    torch.testing.assert_close(logits(model), logits(bare), rtol=0.1, atol=0.1)
    with pytest.raises(ValueError, match="in eight bits"):
        model.merge_and_unload()
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base()))
    mixed = logits(model, ROWS[:2], adapter_names=["default", "__base__"])
    torch.testing.assert_close(mixed[1:], logits(base(), ROWS[1:2]), rtol=0.02, atol=0.02)
    merge_linears(import_onto(tmp_path, model, sizes))


def import_onto(folder, model, sizes):
    """The adapter of `model` on the plain base that it was trained beside."""
    save_adapter(model, folder / "native")
    plain = make_llama(**sizes)
    load_adapter(plain, folder / "native")
    return plain


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Embedding(8, 8), "1 is a Embedding"),
        (lambda: nn.Conv1d(8, 8, 1), "1 is a Conv1d"),
    ],
)
def test_a_layer_that_cannot_be_adapted_leaves_the_model_as_it_was(make, message):
    model = nn.Sequential(nn.Linear(8, 8), make())
    kinds = [type(module) for module in model]
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, RigsaConfig(target_modules=["0", "1"], density=0.5))
    assert [type(module) for module in model] == kinds
    assert model[0].weight.requires_grad


def test_a_density_that_empties_a_layer_names_it():
    model = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 2))
    with pytest.raises(ValueError, match=r"density: 0\.001 leaves 1 empty"):
        get_peft_model(model, RigsaConfig(target_modules=["0", "1"], density=0.001))
    assert isinstance(model[0], nn.Linear)


def test_a_layer_with_an_adapter_of_another_method_is_refused():
    model = get_peft_model(make_llama(), LoraConfig(target_modules=["q_proj"])).base_model.model
    with pytest.raises(ValueError, match=r"q_proj carries an adapter of another method \(peft\.tuners\.lora"):
        inject_adapter_in_model(config(target_modules=["q_proj"]), model, "rigsa_2")


@pytest.mark.parametrize(
    "options",
    [
        {"density": 0}, {"density": 1.5}, {"density": "0.1"}, {"density": True}, {"alpha_init": "1"},
        {"init_scale": None}, {"seed": True}, {"in_place": "no"}, {"density": float("nan")},
        {"init": "best"}, {"seed": -1}, {"alpha_init": float("inf")},
        {"init_scale": -1}, {"values_dtype": "int8"}, {"numerics": "fast"}, {"layers": {"a": 3}},
        {"tile": 8}, {"tile": "diagonals", "density": 0.5}, {"init": "gradient"}, {"init": "gradient", "density": 0.5},
        {"init": "magnitude"}, {"batches": [1]},
    ],
)  # fmt: skip
def test_an_option_out_of_range_is_refused(options):
    with pytest.raises(ValueError, match=f"^{next(iter(options))}: "):
        RigsaConfig(**options)


@pytest.fixture
def folder(tmp_path):
    wrapped(density=0.03).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("loader", LOADERS.values())
def test_another_base_is_refused_or_warned_of(folder, loader):
    with pytest.raises(ValueError, match=r"q_proj is \[32, 32\] in the adapter and \[64, 64\] in the model"):
        loader(make_llama(hidden_size=64), folder)
    with pytest.raises(ValueError, match="layers: 7 of the adapter's layers are not in this model"):
        loader(make_llama(num_hidden_layers=1), folder)
    with pytest.warns(UserWarning, match="trained on another base model: the frozen weights of 14 of 14 layers differ"):
        loader(make_llama(initializer_range=0.5), folder)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the adapter was trained on another base")
        loader(make_llama().bfloat16(), folder)


def test_a_file_that_does_not_fit_its_configuration_is_refused(folder):
    from safetensors.torch import load_file, save_file

    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    key = "base_model.model.model.layers.0.mlp.up_proj.rigsa_adapter.rigsa_columns"
    save_file(tensors | {key: (tensors[key].int() + 30).to(torch.uint16)}, path)
    for loader in LOADERS.values():
        with pytest.raises(RigsaError, match="not an adapter of a layer"):
            logits(loader(make_llama(), folder))


def test_a_pickle_is_refused_before_the_model_is_touched(folder, monkeypatch):
    """From a folder, from a folder within, beside a file of safetensors, and from what is cached of a hub."""
    model = wrapped()
    model.save_pretrained(folder / "pickled", safe_serialization=False)
    pickled = folder / "pickled" / "adapter_model.bin"
    assert pickled.exists()
    base = make_llama()
    loads = [
        lambda: PeftModel.from_pretrained(base, folder / "pickled"),
        lambda: PeftModel.from_pretrained(base, str(folder), subfolder="pickled"),
        lambda: model.load_adapter(folder / "pickled", "other"),
        lambda: base.load_adapter(folder / "pickled"),
        lambda: base.load_adapter(folder, adapter_kwargs={"subfolder": "pickled"}),
        lambda: AutoPeftModelForCausalLM.from_pretrained(folder / "pickled"),
    ]
    for beside in (False, True):
        if beside:
            shutil.copy(folder / "adapter_model.safetensors", folder / "pickled")
        for load in loads:
            with pytest.raises(RigsaError, match=r"adapter_model.bin: expected adapter_model.safetensors alone, got a"):
                load()
    assert not gated_linears(base)
    assert set(model.peft_config) == {"default"}
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: str(pickled))
    monkeypatch.setattr("peft.config.hf_hub_download", lambda *_, **__: str(folder / "adapter_config.json"))
    with pytest.raises(RigsaError, match=r"some/one/adapter_model\.bin: expected adapter_model.safetensors alone"):
        PeftConfig.from_pretrained("some/one")


def test_a_pickle_of_another_method_is_left_to_peft(tmp_path):
    model = get_peft_model(make_llama(), LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert torch.equal(logits(model), logits(PeftModel.from_pretrained(make_llama(), tmp_path)))


def without(ending):
    """A layer loses the tensor whose name ends so."""

    def change(tensors):
        return {name: tensor for name, tensor in tensors.items() if not name.endswith(f"0.mlp.up_proj.{ending}")}

    return change


def with_another_layer(tensors):
    more = {name: tensor.clone() for name, tensor in tensors.items() if "1.mlp.up_proj" in name}
    return tensors | {name.replace("up_proj", "more_proj"): tensor for name, tensor in more.items()}


def without_a_layer(tensors):
    return {name: tensor for name, tensor in tensors.items() if "layers.0.mlp.up_proj" not in name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("rigsa_adapter.rigsa_values"), r"up_proj\.rigsa_adapter has no rigsa_values"),
        (without("rigsa_adapter.rigsa_alpha"), r"up_proj\.rigsa_adapter has no rigsa_alpha"),
        (without_a_layer, "expected the tensors of the 14 layers .* got those of 13"),
        (with_another_layer, "expected the tensors of the 14 layers .* got those of 15"),
        (None, "expected a whole file of safetensors, got one that is cut or damaged"),
    ],
)
@pytest.mark.parametrize("loader", LOADERS.values())
def test_a_damaged_file_is_refused_before_the_model_is_touched(folder, loader, change, message):
    from safetensors.torch import load_file, save_file

    path = folder / "adapter_model.safetensors"
    if change is None:
        path.write_bytes(path.read_bytes()[:-5])
    else:
        save_file(change(load_file(path)), path)
    base = make_llama()
    with pytest.raises(RigsaError, match=message):
        loader(base, folder)
    assert_same_base(base)
    assert not gated_linears(base)


@pytest.mark.parametrize("part", ["values", "alpha"])
@pytest.mark.parametrize("loader", LOADERS.values())
def test_numbers_in_a_file_that_are_not_finite_are_refused(folder, loader, part):
    from safetensors.torch import load_file, save_file

    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    key = f"base_model.model.model.layers.0.mlp.up_proj.rigsa_adapter.rigsa_{part}"
    save_file(tensors | {key: tensors[key] * float("nan")}, path)
    with pytest.raises(RigsaError, match=rf"up_proj.*rigsa_{part}: expected finite numbers"):
        logits(loader(make_llama(), folder))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["q_proj", "up_prj"]}, "target_modules: the model has no module 'up_prj'"),
        ({"exclude_modules": ["q_proj", "down"]}, "exclude_modules: the model has no module 'down'"),
        ({"modules_to_save": ["lm_head", "lm"]}, "modules_to_save: the model has no module 'lm'"),
        (
            {"target_parameters": ["q_proj.weights"], "target_modules": ["v_proj"]},
            "target_parameters: the model has no parameter 'q_proj.weights'",
        ),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1, 2]}, "layers_to_transform: no layer numbered 2"),
    ],
)
@pytest.mark.filterwarnings("ignore:target_parameters=")  # PEFT's own, where there is no other parameter
def test_a_name_that_fits_nothing_is_refused(options, message):
    base = make_llama()
    kinds = [type(module) for module in base.modules()]
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, config(**options))
    assert [type(module) for module in base.modules()] == kinds
    assert all(parameter.requires_grad for parameter in base.parameters())
    model = wrapped(modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match=message):
        model.add_adapter("other", config(**options))
    assert torch.equal(logits(model), logits(wrapped()))


def test_a_combination_has_the_layers_of_all_its_adapters():
    model = wrapped(target_modules=["q_proj", "v_proj"], layers_to_transform=[0], exclude_modules=["v_proj"])
    model.add_adapter("other", config(target_modules=["up_proj"], layers_to_transform=[1]))
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "both")
    model.set_adapter("both")
    assert set(adapted_layers(model)) == {"model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"}


@pytest.mark.parametrize("loader", LOADERS.values())
def test_a_file_of_another_version_is_refused(folder, loader):
    path = folder / "adapter_config.json"
    saved = json.loads(path.read_text())
    assert saved["format"] == 1
    del saved["format"]  # as the first version wrote it
    path.write_text(json.dumps(saved))
    assert torch.equal(logits(loader(make_llama(), folder)), logits(wrapped(density=0.03)))
    path.write_text(json.dumps(saved | {"format": 2, "what_comes_later": True}))
    base = make_llama()
    with pytest.raises(ValueError, match="format: expected 1, got 2; the adapter was saved by another version"):
        loader(base, folder)
    assert not gated_linears(base)


def test_a_configuration_from_a_file_without_its_tensors_is_refused(folder):
    model = get_peft_model(make_llama(), PeftConfig.from_pretrained(folder))
    with pytest.raises(RigsaError, match="make a new RigsaConfig"):
        logits(model)


def test_importing_rigsa_after_peft_and_before_it_registers_once():
    check = (
        "assert peft.PeftType('RIGSA') is peft.PeftType.RIGSA; assert 'RIGSA' in list(peft.PeftType); "
        "import pickle, copy; assert pickle.loads(pickle.dumps(peft.PeftType.RIGSA)) is peft.PeftType.RIGSA; "
        "assert peft.PEFT_TYPE_TO_CONFIG_MAPPING['RIGSA'].__name__ == 'RigsaConfig'"
    )
    runs = [
        subprocess.Popen([sys.executable, "-c", code + check], stderr=subprocess.PIPE, text=True)
        for code in (
            "import rigsa, sys; assert 'peft' not in sys.modules and 'torch' not in sys.modules; import peft; ",
            "import rigsa; rigsa.RigsaConfig; import peft; ",
        )
    ]
    for run in runs:
        errors = run.communicate()[1]
        assert run.returncode == 0, errors


def test_a_watched_package_has_its_own_loader(tmp_path, monkeypatch):
    """What is called once it is imported finds it whole; what is imported already has it called at once."""
    (tmp_path / "watched_package.py").write_text("value = 3")
    monkeypatch.syspath_prepend(tmp_path)
    seen = []
    when_imported("watched_package", lambda: seen.append(sys.modules["watched_package"].value))
    assert importlib.util.find_spec("a_package_that_is_not_there") is None
    assert seen == []
    import watched_package

    assert seen == [3]
    assert type(watched_package.__spec__.loader) is type(json.__spec__.loader)
    when_imported("watched_package", lambda: seen.append("at once"))
    assert seen == [3, "at once"]
    assert "watched_package" not in [getattr(finder, "package", "") for finder in sys.meta_path]


@pytest.mark.parametrize(
    "change",
    [
        {"entries": -1}, {"entries": 2**40}, {"entries": True}, {"shape": [4]}, {"shape": [0, 4]}, {"encoding": "zip"},
        {"encoding": "dense"}, {"base": {"sample": "00", "nf4": False}}, {"base": {}}, {"more": 1},
    ],
)  # fmt: skip
def test_a_configuration_that_says_nonsense_of_a_layer_is_refused(folder, change):
    path = folder / "adapter_config.json"
    saved = json.loads(path.read_text())
    saved["layers"]["model.layers.0.mlp.up_proj"] |= change
    path.write_text(json.dumps(saved))
    for loader in LOADERS.values():
        with pytest.raises(ValueError, match=r"layers: model\.layers\.0\.mlp\.up_proj"):
            loader(make_llama(), folder)
