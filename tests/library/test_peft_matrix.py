"""Cases of PEFT's own matrix (its tests/testing_common.py and test_custom_models.py) that stand nowhere else here."""

import pytest
import torch

pytest.importorskip("peft", minversion="0.21")

from peft import PeftModel, get_peft_model
from peft.utils.save_and_load import get_base_model_state_dict, set_base_model_state_dict

from conftest import WORDS, make_llama
from rigsa import RigsaConfig
from rigsa.peft_tuner.model import layers_of

ROWS = torch.arange(18).view(3, 6) % len(WORDS)
GENERATION = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}


def config(**options):
    return RigsaConfig(**{"density": 0.3, "alpha_init": 0.3, "task_type": "CAUSAL_LM"} | options)


def wrapped(**options):
    return get_peft_model(make_llama(), config(**options)).eval()


def with_two(first=None, second=None):
    model = wrapped(**(first or {}))
    model.add_adapter("other", config(**{"seed": 5, "density": 0.1} | (second or {})))
    return model


def logits(model, **others):
    with torch.no_grad():
        return model.eval()(input_ids=ROWS, **others).logits


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_the_state_of_the_base_is_read_and_set_under_its_own_names():
    """Whatever passes have composed into a weight."""
    model, base = wrapped(), make_llama().state_dict()
    before = logits(model)
    found = get_base_model_state_dict(model)
    assert found.keys() == base.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in base.items())
    other = make_llama(initializer_range=0.1)
    set_base_model_state_dict(model, other.state_dict())
    assert torch.equal(logits(model), logits(get_peft_model(other, config())))
    assert not torch.equal(logits(model), before)
    set_base_model_state_dict(model, base)
    assert torch.equal(logits(model), before)


def test_a_prompt_is_given_by_position_and_beams_are_searched():
    model, base = with_two(), make_llama()
    assert torch.equal(model.generate(ROWS, **GENERATION), model.generate(input_ids=ROWS, **GENERATION))
    beams = GENERATION | {"num_beams": 2}
    found = model.generate(input_ids=ROWS, adapter_names=["default", "__base__", "other"], **beams)
    assert torch.equal(found[1:2], base.generate(input_ids=ROWS[1:2], **beams))
    assert torch.equal(found[:1], wrapped().generate(input_ids=ROWS[:1], **beams))


def test_an_adapter_is_loaded_by_a_device_map(tmp_path):
    model = wrapped()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_llama(), tmp_path, device_map={"": "cpu"})
    assert torch.equal(logits(model), logits(loaded))


def test_a_merged_adapter_is_deleted_only_after_it_was_unmerged():
    model = wrapped()
    model.merge_adapter()
    before = logits(model)
    with pytest.raises(ValueError, match="while they are merged"):
        model.delete_adapter("default")
    assert torch.equal(logits(model), before)
    assert all(layer.merged_adapters == ["default"] for layer in layers_of(model))
    model.unmerge_adapter()
    model.delete_adapter("default")
    assert torch.equal(logits(model.base_model.model), logits(make_llama()))


def test_a_second_adapter_of_the_same_name_changes_nothing():
    model = wrapped()
    with pytest.raises(ValueError, match="already exists"):
        model.add_adapter("default", config(seed=5))
    assert torch.equal(logits(model), logits(wrapped()))


def test_a_context_without_adapters_ends_as_it_began():
    model = with_two()
    model.set_adapter("other")
    before, names = logits(model), trainable(model)
    with model.disable_adapter():
        assert not trainable(model)
    assert torch.equal(logits(model), before)
    assert trainable(model) == names
    model.base_model.disable_adapter_layers()
    with model.disable_adapter():
        pass
    assert torch.equal(logits(model), logits(make_llama()))


@pytest.mark.parametrize("second", [{"target_modules": ["v_proj"]}, {"target_modules": ["q_proj", "v_proj"]}])
def test_adapters_on_other_layers_switch_and_mix(second):
    first = {"target_modules": ["q_proj"]}
    model = with_two(first, second)
    only = {"default": logits(wrapped(**first)), "other": logits(wrapped(**{"seed": 5, "density": 0.1} | second))}
    for name in ("other", "default", "other"):
        model.set_adapter(name)
        assert torch.equal(logits(model), only[name])
        assert all(f".{name}." in one for one in trainable(model))
    found = logits(model, adapter_names=["default", "other", "__base__"])
    expected = torch.stack([only["default"][0], only["other"][1], logits(make_llama())[2]])
    torch.testing.assert_close(found, expected)


def test_each_adapter_has_its_own_copy_of_a_module_to_save(tmp_path):
    model = with_two({"modules_to_save": ["lm_head"]}, {"modules_to_save": ["lm_head"]})
    head = model.base_model.model.lm_head
    with torch.no_grad():
        head.modules_to_save["default"].weight.add_(0.1)
        head.modules_to_save["other"].weight.sub_(0.2)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_llama(), tmp_path)
    loaded.load_adapter(tmp_path / "other", "other")
    seen = []
    for name in ("default", "other"):
        model.set_adapter(name), loaded.set_adapter(name)
        assert torch.equal(logits(model), logits(loaded))
        seen.append(logits(model))
        assert {one.partition(f".{name}.")[0].rpartition(".")[2] for one in trainable(model)} == {
            "rigsa_adapter",
            "modules_to_save",
        }
    assert not torch.equal(*seen)
    mixed = logits(model, adapter_names=["default", "other", "default"])
    torch.testing.assert_close(mixed, torch.stack([seen[0][0], seen[1][1], seen[0][2]]))
    model.delete_adapter("other")
    model.set_adapter("default")
    assert torch.equal(logits(model), seen[0])
    with pytest.raises(ValueError, match="has modules_to_save, which cannot be combined"):
        model.add_weighted_adapter(["default"], [1.0], "both")


@pytest.mark.parametrize("is_trainable", [False, True])
def test_what_is_loaded_is_trained_only_where_that_is_asked_for(tmp_path, is_trainable):
    wrapped(modules_to_save=["lm_head"]).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(make_llama(), tmp_path, is_trainable=is_trainable)
    assert bool(trainable(model)) == is_trainable
    model.load_adapter(tmp_path, "other", is_trainable=is_trainable)
    assert bool(trainable(model)) == is_trainable
    model.set_adapter("other")
    assert all(".other." in name for name in trainable(model))
    assert trainable(model)
    model.set_adapter("default", inference_mode=True)
    assert not trainable(model)
    model.set_requires_grad("other")
    assert all(".other." in name for name in trainable(model))
    assert trainable(model)


def test_names_of_adapters_make_no_difference():
    found = []
    for name in ("default", "q-proj", "rigsa_adapter", "ünï code", "v1"):
        found.append(logits(get_peft_model(make_llama(), config(), name)))
    assert all(torch.equal(one, found[0]) for one in found)
