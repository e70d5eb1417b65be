"""Adapters on disk: what was saved is loaded, anything else is one error, and no model is left half changed."""

import hashlib
import json
import math
import os
import re
import warnings

import pytest
import torch
import torch.nn as nn
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from conftest import make_llama
from rigsa import (
    MaskedAdamW,
    RigsaError,
    SparsePattern,
    gated_linears,
    load_adapter,
    replace_linears,
    restore_linears,
    save_adapter,
)
from rigsa.encoding import choose_encoding, decode, digest, encode, layout
from rigsa.saving import CONFIG_FILE, load_tensors, read_patterns, read_record, read_states

IDS = torch.tensor([[1, 5, 9, 2, 7, 3]])


def set_values(model, seed=0, gate=0.3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in gated_linears(model).values():
            layer.rigsa_values.copy_(torch.randn(layer.rigsa_values.shape, generator=generator))
            layer.rigsa_alpha.fill_(gate)
    return model


def adapted(seed=0, base=make_llama, **options):
    return set_values(replace_linears(base(), seed=seed, **options), seed)


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def folder(tmp_path):
    save_adapter(adapted(density=0.2), tmp_path)
    return tmp_path


def file_of(folder):
    return folder / json.loads((folder / CONFIG_FILE).read_text())["file"]


def rewrite(folder, change_tensors=lambda tensors: None, change_record=lambda record: None):
    """Another adapter in `folder`, whose hashes are right."""
    path, config = file_of(folder), json.loads((folder / CONFIG_FILE).read_text())
    where = {name: config.pop(name) for name in ("file", "bytes", "sha256")}
    tensors = load_file(path)
    change_tensors(tensors)
    change_record(config)
    text = json.dumps(config, separators=(",", ":")).encode()
    tensors["rigsa_config"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    save_file(tensors, path, {"format": "pt"})
    content = path.read_bytes()
    where |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / CONFIG_FILE).write_text(json.dumps(config | where))


def assert_refused(folder, match, model=None):
    """On a bare base and on an adapted one, both of which stay as they were."""
    for target in (make_llama(), adapted(seed=9, density=0.4)) if model is None else (model,):
        before = state(target)
        with pytest.raises(RigsaError, match=match):
            load_adapter(target, folder)
        assert equal(before, state(target))


@pytest.mark.parametrize("density", [None, 1.0, 0.5, 0.03])
@pytest.mark.parametrize("shared_gate", [False, True])
@pytest.mark.parametrize("values_dtype", [torch.float32, torch.bfloat16])
def test_a_bare_base_becomes_the_adapted_model(tmp_path, density, shared_gate, values_dtype):
    model = adapted(seed=3, density=density, shared_gate=shared_gate, values_dtype=values_dtype, alpha_init=0.1)
    save_adapter(model, tmp_path)
    loaded = make_llama()
    load_adapter(loaded, tmp_path, strict=True)
    assert equal(state(model), state(loaded))
    assert torch.equal(logits(model), logits(loaded))
    trained = [[name for name, p in m.named_parameters() if p.requires_grad] for m in (model, loaded)]
    assert trained[0] == trained[1]
    for one, other in zip(gated_linears(model).values(), gated_linears(loaded).values(), strict=True):
        assert one.rigsa_values.dtype == other.rigsa_values.dtype
        for name in ("seed", "key", "bound", "alpha_init", "numerics"):
            assert getattr(one, name) == getattr(other, name)
        one.set_pattern(one.pattern), other.set_pattern(other.pattern)
        assert torch.equal(one.rigsa_values, other.rigsa_values)  # the same initial values come back


@pytest.mark.parametrize(
    "options", [{}, {"density": 0.3}, {"density": 0.02}, {"seed": 7, "density": 0.3}, {"seed": 1, "init_scale": 2.0}]
)
def test_an_adapted_model_takes_pattern_values_and_seed_of_the_file(tmp_path, options):
    model = adapted(seed=1, density=0.3)
    save_adapter(model, tmp_path)
    other = adapted(**options)
    before = state(other)
    with pytest.raises(RigsaError, match=r"q_proj has .*replace=True"):
        load_adapter(other, tmp_path, strict=True)
    assert equal(before, state(other))
    load_adapter(other, tmp_path, strict=True, replace=True)
    assert equal(state(model), state(other))
    assert torch.equal(logits(model), logits(other))
    assert {layer.seed for layer in gated_linears(other).values()} == {1}


def test_layers_of_several_calls_keep_their_own_options(tmp_path):
    model = replace_linears(make_llama(), "*mlp*", seed=1, values_dtype=torch.bfloat16, alpha_init=0.5)
    replace_linears(model, "*self_attn*", seed=2, density=0.3)
    save_adapter(set_values(model), tmp_path)
    loaded = make_llama()
    load_adapter(loaded, tmp_path)
    assert equal(state(model), state(loaded))
    layers = gated_linears(loaded)
    assert {layer.seed for name, layer in layers.items() if "mlp" in name} == {1}
    assert all(layer.rigsa_values.requires_grad and layer.rigsa_alpha.requires_grad for layer in layers.values())
    assert not layers["model.layers.0.mlp.up_proj"].weight.requires_grad


def test_loading_is_in_place_where_shapes_allow(tmp_path):
    save_adapter(adapted(seed=1, density=0.3), tmp_path)
    model = adapted(seed=2, density=0.3)  # other entries, as many of them
    optimizer = MaskedAdamW(model, lr=0.1)
    parameters = list(model.parameters())
    load_adapter(model, tmp_path, replace=True)
    assert all(one is other for one, other in zip(parameters, model.parameters(), strict=True))
    before = state(model)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    for name in gated_linears(model):
        moved = (before[f"{name}.rigsa_values"] - model.get_parameter(f"{name}.rigsa_values")).abs().max()
        assert moved > 0.05


@pytest.mark.parametrize("density", [0.3, 0.1, None])
def test_what_was_frozen_stays_frozen(tmp_path, density):
    save_adapter(adapted(density=0.3), tmp_path)
    model = adapted(seed=2, density=density).requires_grad_(False)
    load_adapter(model, tmp_path, replace=True)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("density", [0.002, 0.01, 0.03, 0.05, 0.08, 0.5, None])
def test_a_file_is_as_small_as_its_encoding_allows(tmp_path, density):
    """Values, and the smaller of one bit a weight and two bytes an entry, and the rows' counts."""
    size = 1024
    model = replace_linears(nn.Sequential(nn.Linear(size, size)), density=density, values_dtype=torch.bfloat16)
    save_adapter(model, tmp_path)
    entries = model[0].pattern.nnz
    needed = 2 * entries + (0 if density is None else min(size * size / 8, 2 * entries + 2 * size))
    assert file_of(tmp_path).stat().st_size <= needed * 1.02 + 1500


def test_a_shared_gate_is_written_once(tmp_path):
    save_adapter(adapted(shared_gate=True), tmp_path)
    assert load_file(file_of(tmp_path))["rigsa_gates"].shape == (1,)
    loaded = make_llama()
    load_adapter(loaded, tmp_path)
    assert len({id(layer.rigsa_alpha) for layer in gated_linears(loaded).values()}) == 1
    assert_refused(tmp_path, "shares its gate", adapted())


def test_a_plain_module_needs_no_transformers(tmp_path):
    def base():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(40, 24), nn.ReLU(), nn.Linear(24, 3))

    model = set_values(replace_linears(base(), density=0.3))
    save_adapter(nn.DataParallel(model), tmp_path)
    loaded = base()
    load_adapter(loaded, tmp_path, strict=True)
    assert equal(state(model), state(loaded))


def test_values_in_float64(tmp_path):
    model = adapted(base=lambda: make_llama().double())
    assert gated_linears(model)["model.layers.0.mlp.up_proj"].rigsa_values.dtype == torch.float64
    save_adapter(model, tmp_path)
    loaded = make_llama().double()
    load_adapter(loaded, tmp_path)
    assert equal(state(model), state(loaded))


def test_what_is_on_disk_can_be_asked_without_a_model(folder):
    model = make_llama()
    load_adapter(model, folder)
    record, patterns, states = read_record(folder), read_patterns(folder), read_states(folder)
    assert abs(record.density - 0.2) < 0.01
    for name, layer in gated_linears(model).items():
        assert torch.equal(patterns[name].words, layer.rigsa_words)
        assert torch.equal(states[name].values, layer.rigsa_values)
        assert torch.equal(states[name].gate, layer.rigsa_alpha)


# The base.


def nf4(model):
    bnb = pytest.importorskip("bitsandbytes")
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "lm_head" not in name:
            linear = bnb.nn.Linear4bit(
                module.in_features, module.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4"
            )
            linear.weight = bnb.nn.Params4bit(
                module.weight.data, requires_grad=False, quant_type="nf4", module=linear, compress_statistics=False
            )
            model.set_submodule(name, linear.to("cpu"))
    return model


def resized():
    model = make_llama()
    model.resize_token_embeddings(len(model.model.embed_tokens.weight) + 8)
    return model


WIDE = {"hidden_size": 64, "intermediate_size": 96}  # NF4 decodes 32 columns at a time
BASES = {
    "bfloat16": lambda: make_llama(**WIDE).bfloat16(),
    "float16": lambda: make_llama(**WIDE).half(),
    "float64": lambda: make_llama(**WIDE).double(),
    "NF4": lambda: nf4(make_llama(**WIDE)),
}


@pytest.mark.parametrize("name", BASES)
def test_the_same_base_in_another_dtype_is_known(tmp_path, name):
    save_adapter(adapted(base=lambda: make_llama(**WIDE)), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(BASES[name](), tmp_path, strict=True)


@pytest.mark.parametrize("name", BASES)
def test_an_adapter_trained_on_another_dtype_is_known(tmp_path, name):
    save_adapter(adapted(base=BASES[name]), tmp_path)
    load_adapter(make_llama(**WIDE), tmp_path, strict=True)


def test_a_resized_embedding_is_the_same_base(folder):
    load_adapter(resized(), folder, strict=True)


@pytest.mark.parametrize("change", [lambda weight: weight.mul_(1.02), nn.init.normal_, lambda weight: weight.neg_()])
def test_another_base_warns_and_is_refused_when_strict(folder, change):
    other = make_llama()
    with torch.no_grad():
        change(other.model.layers[1].mlp.up_proj.weight)
    with pytest.raises(RigsaError, match=r"another base model: .* 1 of 14 layers differ \(model.layers.1.mlp.up_proj"):
        load_adapter(other, folder, strict=True)
    assert not gated_linears(other)
    with pytest.warns(UserWarning, match="another base model"):
        load_adapter(other, folder)
    assert gated_linears(other)


def test_other_weights_are_told_apart_in_four_bits_too(tmp_path):
    save_adapter(adapted(base=BASES["NF4"]), tmp_path)
    other = make_llama(**WIDE)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(torch.randn(parameter.shape) * parameter.std())
    with pytest.raises(RigsaError, match="14 of 14 layers"):
        load_adapter(nf4(other), tmp_path, strict=True)


def test_the_name_of_the_base_is_compared_by_its_last_part(tmp_path):
    def named(name):
        model = make_llama()
        model.config._name_or_path = name
        return model

    save_adapter(adapted(base=lambda: named("someone/small-llama")), tmp_path)
    load_adapter(named("/data/small-llama/"), tmp_path, strict=True)
    with pytest.raises(RigsaError, match="'someone/small-llama', this model 'someone/other'"):
        load_adapter(named("someone/other"), tmp_path, strict=True)


# What is trained beside the gated layers.


def with_head(**options):
    """A new head, trained as it is."""
    model = set_values(replace_linears(make_llama(), modules_to_save=["lm_head"], density=0.2, **options))
    with torch.no_grad():
        model.lm_head.weight.normal_()
    return model


@pytest.mark.parametrize("frozen", [False, True])
def test_a_trained_head_is_saved_and_loaded(tmp_path, frozen):
    model = with_head()
    if frozen:
        model.requires_grad_(False)
    save_adapter(model, tmp_path)
    for loaded in (make_llama(), replace_linears(make_llama(), density=0.3, seed=5)):
        load_adapter(loaded, tmp_path, strict=True, replace=True)
        assert equal(state(model), state(loaded))
        assert torch.equal(logits(model), logits(loaded))
    bare = make_llama()
    load_adapter(bare, tmp_path)
    assert bare.lm_head.weight.requires_grad
    assert not bare.model.embed_tokens.weight.requires_grad
    bare.requires_grad_(False)
    save_adapter(bare, tmp_path / "again")
    assert read_record(tmp_path / "again").parameters == read_record(tmp_path).parameters


def test_a_trained_head_that_does_not_fit_is_refused(tmp_path):
    save_adapter(with_head(), tmp_path)
    assert_refused(tmp_path, r"lm_head.weight, trained beside the adapter, is \[21, 32\] in the adapter and \[40, 32\]",
                   make_llama(vocab_size=40))  # fmt: skip
    assert_refused(tmp_path, "lm_head.weight is in float32, which torch.bfloat16", make_llama().bfloat16())
    rewrite(tmp_path, lambda tensors: tensors["rigsa_parameter:lm_head.weight"].view(-1)[:1].fill_(math.nan))
    assert_refused(tmp_path, "lm_head.weight: expected finite numbers", make_llama())
    model = with_head()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = math.inf
    with pytest.raises(RigsaError, match=r"finite numbers to save, got lm_head.weight"):
        save_adapter(model, tmp_path)


# What does not fit.


def test_other_layers_are_refused_by_name(folder, tmp_path):
    fewer = adapted(include="*mlp*")
    assert_refused(folder, "self_attn.q_proj: the model carries no adapter there", fewer)
    save_adapter(fewer, tmp_path / "fewer")
    assert_refused(tmp_path / "fewer", "q_proj: the adapter has none there", adapted())
    assert_refused(folder, r"gate_proj is \[48, 32\] in the adapter and \[64, 32\]", make_llama(intermediate_size=64))
    assert_refused(folder, "cannot carry it on model.layers.0.* no layer of this name", nn.Sequential(nn.Linear(3, 3)))
    load_adapter(restore_linears(fewer), folder)


def test_values_are_never_rounded(tmp_path):
    save_adapter(adapted(values_dtype=torch.float32), tmp_path / "wide")
    save_adapter(adapted(values_dtype=torch.bfloat16), tmp_path / "narrow")
    assert_refused(tmp_path / "wide", "float32, which torch.bfloat16", adapted(values_dtype=torch.bfloat16))
    load_adapter(adapted(), tmp_path / "narrow")


def test_nothing_to_save(tmp_path):
    with pytest.raises(ValueError, match=r"expected gated sparse layers.*replace_linears"):
        save_adapter(make_llama(), tmp_path)


def test_a_folder_that_cannot_be_written_is_one_error(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / ("n" * 300)):
        for save in (save_adapter, lambda model, folder: model.save_pretrained(folder)):
            with pytest.raises(RigsaError, match="cannot write"):
                save(adapted(), folder)


@pytest.mark.parametrize("what", ["values", "alpha"])
@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_what_is_not_finite_is_not_saved(folder, what, number):
    model = adapted(seed=4)
    with torch.no_grad():
        gated_linears(model)["model.layers.1.mlp.up_proj"].get_parameter(f"rigsa_{what}").view(-1)[-1] = number
    with pytest.raises(RigsaError, match=r"layers.1.mlp.up_proj"):
        save_adapter(model, folder)
    load_adapter(make_llama(), folder)  # what was there before


def test_a_process_killed_while_it_saves_leaves_one_adapter_or_the_other(folder, monkeypatch):
    first, second = adapted(density=0.2), adapted(seed=8, density=0.3)
    done, replace = [], os.replace

    def stop_at(count):
        done.clear()

        def dying(source, target):
            if len(done) == count:
                raise KeyboardInterrupt
            done.append(target)
            replace(source, target)

        monkeypatch.setattr(os, "replace", dying)

    for count in range(3):
        save_adapter(first, folder)
        stop_at(count)
        with pytest.raises(KeyboardInterrupt):
            save_adapter(second, folder)
        monkeypatch.undo()
        loaded = make_llama()
        load_adapter(loaded, folder)
        assert equal(state(loaded), state(first))
    save_adapter(second, folder)
    assert len(list(folder.glob("*.safetensors"))) == 1
    loaded = make_llama()
    load_adapter(loaded, folder)
    assert equal(state(loaded), state(second))


def test_equal_adapters_are_equal_files(tmp_path):
    for name in ("a", "b"):
        save_adapter(adapted(density=0.1), tmp_path / name)
    assert [file_of(tmp_path / name).read_bytes() for name in "ab"].count(file_of(tmp_path / "a").read_bytes()) == 2


# Hostile files: hashes are right, the content is not.

LAYER = "model.layers.0.mlp.down_proj"  # 32 x 48: a row does not end at a word


def change_layer(**changes):
    return lambda record: record["layers"][LAYER].update(changes)


def change_tensor(name, change):
    def apply(tensors):
        tensors[name] = change(tensors[name])

    return lambda folder: rewrite(folder, apply)


def with_record(change):
    return lambda folder: rewrite(folder, change_record=change)


def put(place, number):
    def change(tensor):
        tensor = tensor.clone()
        tensor[place] = number
        return tensor

    return change


def flip_bit(bits):
    return put(0, int(bits[0]) ^ 1)(bits)


HOSTILE = {
    "an entry more": (change_tensor(f"{LAYER}.bits", flip_bit), "down_proj: its pattern is damaged: expected"),
    "values too short": (change_tensor(f"{LAYER}.values", lambda v: v[:-1].clone()), "expected"),
    "values not finite": (change_tensor(f"{LAYER}.values", put(3, math.nan)), "down_proj.values: expected finite"),
    "values infinite": (change_tensor(f"{LAYER}.values", put(3, -math.inf)), "down_proj.values: expected finite"),
    "a gate not finite": (change_tensor("rigsa_gates", put(0, math.inf)), "rigsa_gates: expected finite"),
    "values of another dtype": (change_tensor(f"{LAYER}.values", lambda v: v.int()), "I32|expected"),
    "values as bool": (change_tensor(f"{LAYER}.values", lambda v: v.bool()), "BOOL|expected"),
    "values complex": (change_tensor(f"{LAYER}.values", lambda v: v.to(torch.complex64)), "C64|expected"),
    "a tensor too many": (lambda f: rewrite(f, lambda t: t.update(x=torch.zeros(1))), "expected"),
    "a tensor too few": (lambda f: rewrite(f, lambda t: t.pop(f"{LAYER}.bits")), "expected"),
    "another hash of the pattern": (with_record(change_layer(pattern="0" * 64)), "down_proj: its pattern is not"),
    "entries beyond the matrix": (with_record(change_layer(entries=10**6)), "entries"),
    "entries below 0": (with_record(change_layer(entries=-1)), "entries"),
    "entries that are no number": (with_record(change_layer(entries="9")), "entries has the wrong type"),
    "entries that are a truth value": (with_record(change_layer(entries=True)), "entries has the wrong type"),
    "a dense layer with entries missing": (with_record(change_layer(encoding="dense")), "entries"),
    "a huge shape": (with_record(change_layer(shape=[2**31, 2**31])), "shape"),
    "a wide shape": (with_record(change_layer(shape=[16, 96])), "density|in the adapter"),
    "a shape of three": (with_record(change_layer(shape=[4, 4, 96])), "shape"),
    "an unknown encoding": (with_record(change_layer(encoding="pickle")), "encoding"),
    "an unknown dtype": (with_record(change_layer(values_dtype="float8")), "values_dtype"),
    "a seed beyond 64 bits": (with_record(change_layer(seed=2**64)), "seed"),
    "a key beyond 32 bits": (with_record(change_layer(key=2**32)), "key"),
    "a bound not finite": (with_record(change_layer(bound=10**400)), "too large|bound"),
    "numerics unknown": (with_record(change_layer(numerics="fast")), "numerics"),
    "a gate that is not there": (with_record(change_layer(gate=99)), "gates"),
    "a sample that is no number": (with_record(change_layer(base={"sample": "xy", "nf4": False})), "base"),
    "a field too many": (with_record(change_layer(extra=1)), "extra"),
    "a field too few": (with_record(lambda record: record["layers"][LAYER].pop("seed")), "seed"),
    "no layers": (with_record(lambda record: record["layers"].clear()), "layers"),
    "layers as a list": (with_record(lambda record: record.update(layers=[])), "layers"),
    "a billion gates": (with_record(lambda record: record.update(gates=10**9)), "gates"),
    "another version": (with_record(lambda record: record.update(version=2)), "version: expected 1, got 2"),
    "another format": (with_record(lambda record: record.update(format="peft")), "format"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused(folder, name):
    damage, match = HOSTILE[name]
    damage(folder)
    assert_refused(folder, match)


def test_columns_are_checked(tmp_path):
    save_adapter(adapted(density=0.02, base=lambda: make_llama(**WIDE)), tmp_path)
    name = "model.layers.0.mlp.down_proj"
    assert f"{name}.columns" in load_file(file_of(tmp_path))

    def signed(change):
        def apply(tensors):
            for part in ("columns", "rows"):
                numbers = tensors[f"{name}.{part}"].view(torch.int16).long()
                tensors[f"{name}.{part}"] = change(part, numbers).to(torch.int16).view(torch.uint16)

        return apply

    damages = {
        "beyond the last": lambda part, n: torch.where(n == n.max(), 96, n) if part == "columns" else n,
        "descending": lambda part, n: n.flip(0) if part == "columns" else n,
        "rows that hold more": lambda part, n: n + 1 if part == "rows" else n,
    }
    for change in damages.values():
        save_adapter(adapted(density=0.02, base=lambda: make_llama(**WIDE)), tmp_path)
        rewrite(tmp_path, signed(change))
        assert_refused(tmp_path, "its pattern is damaged", make_llama(**WIDE))


@pytest.mark.parametrize("which", ["config", "weights"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "missing", "empty", "pickle", "link to nothing"])
def test_what_is_not_a_file_of_ours_is_refused(folder, which, kind):
    path = folder / CONFIG_FILE if which == "config" else file_of(folder)
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)  # would hang
    elif kind == "folder":
        path.mkdir()
    elif kind == "empty":
        path.touch()
    elif kind == "pickle":
        torch.save({"a": torch.ones(3)}, path)
    elif kind == "link to nothing":
        path.symlink_to(folder / "nothing")
    assert_refused(folder, str(folder))


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "x.bin", "rigsa_adapter-0.safetensors/.."])
def test_the_file_lies_in_the_folder(folder, name):
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps(config | {"file": name}))
    assert_refused(folder, "file: expected a name that save_adapter gives")


@pytest.mark.parametrize("length", [2**63, 10**9, 0])
def test_an_absurd_header_takes_no_memory(folder, length):
    path = file_of(folder)
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    os.truncate(path, 2**36)  # 64 GiB of holes
    assert_refused(folder, f"{length}.* in a file of 68719476736")


def test_nested_json_is_refused(folder):
    (folder / CONFIG_FILE).write_text("[" * 100_000)
    assert_refused(folder, str(folder))
    (folder / CONFIG_FILE).write_text('{"a": NaN}')
    assert_refused(folder, "finite")


def three_layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 24), nn.Linear(24, 64), nn.Linear(64, 400))


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    """One layer of each encoding."""
    folder = tmp_path_factory.mktemp("fuzzed")
    model = replace_linears(three_layers())
    for number, density in ((1, 0.3), (2, 0.02)):
        generator = torch.Generator().manual_seed(number)
        mask = torch.rand(model[number].pattern.shape, generator=generator) < density
        model[number].set_pattern(SparsePattern.from_mask(mask))
    save_adapter(set_values(model), folder)
    assert {layer.encoding for layer in read_record(folder).layers.values()} == {"dense", "bits", "columns"}
    return folder, {path.name: path.read_bytes() for path in folder.iterdir()}, state(model)


def damaged(data, content):
    content = bytearray(content)
    edge = 8 + int.from_bytes(content[:8], "little")  # of a safetensors header: half of the damage is done there
    for _ in range(data.draw(st.integers(1, 4))):
        most = len(content) if data.draw(st.booleans()) else min(edge, len(content))
        place = data.draw(st.integers(0, max(most - 1, 0)))
        kind = data.draw(st.sampled_from(["byte", "bit", "cut", "insert", "copy"]))
        if kind in ("byte", "bit") and place < len(content):
            content[place] ^= data.draw(st.integers(1, 255)) if kind == "byte" else 1 << data.draw(st.integers(0, 7))
        elif kind == "cut":
            del content[place : place + data.draw(st.integers(1, 64))]
        elif kind == "insert":
            content[place:place] = data.draw(st.binary(min_size=1, max_size=8))
        else:
            content[place:place] = content[place : place + 40]
    return content


@settings(max_examples=400)
@given(st.data())
def test_a_damaged_folder_loads_what_was_saved_or_is_refused(fuzzed, data):
    folder, contents, saved = fuzzed
    name = data.draw(st.sampled_from(sorted(contents)))
    content = damaged(data, contents[name])
    for other, whole in contents.items():
        (folder / other).write_bytes(bytes(content) if other == name else whole)
    model = replace_linears(three_layers(), seed=9)
    before = state(model)
    try:
        load_adapter(model, folder, strict=True)
    except RigsaError:
        assert equal(before, state(model))
    else:
        assert equal(saved, state(model))


@settings(max_examples=400)
@given(st.data())
def test_a_damaged_record_without_a_hash_loads_a_sound_adapter_or_is_refused(fuzzed, data):
    """The tensors of a Trainer's checkpoint come without a hash of the file: everything else has to hold."""
    folder, _, _ = fuzzed
    path = next(iter(folder.glob("*.safetensors")))
    path.write_bytes(fuzzed[1][path.name])
    tensors = load_file(path)
    if data.draw(st.booleans()):
        text = bytes(tensors["rigsa_config"].numpy()).decode()
        numbers = [match.span() for match in re.finditer(r"-?[0-9.]+(?=[,}\]])|true|false", text)]
        begin, end = data.draw(st.sampled_from(numbers))
        other = data.draw(st.sampled_from(["-1", "0", "1", "2", "1e308", "1e999", "65535", str(2**31), str(2**64), "{}",
                                           "[]", "null", "true", '"x"', "0.5", "99999999999999999999999"]))  # fmt: skip
        content = (text[:begin] + other + text[end:]).encode()
    else:
        content = damaged(data, bytes(tensors["rigsa_config"].numpy()))
    tensors["rigsa_config"] = torch.frombuffer(bytearray(content or b" "), dtype=torch.uint8)
    model = replace_linears(three_layers(), seed=9)
    before = state(model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of another base
            load_tensors(model, tensors)
    except RigsaError:
        assert equal(before, state(model))
    else:
        for name, layer in gated_linears(model).items():
            assert layer.rigsa_values.shape == layer.pattern.values_shape
            assert torch.equal(layer.rigsa_values, tensors[f"{name}.values"])
            words = layer.rigsa_words
            assert words is None or SparsePattern.from_words(words, layer.in_features).nnz == layer.pattern.nnz


@settings(max_examples=60)
@given(
    rows=st.integers(1, 40), columns=st.integers(1, 80), density=st.floats(0, 1), seed=st.integers(0, 9), data=st.data()
)
def test_every_encoding_gives_the_pattern_back(rows, columns, density, seed, data):
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < density
    pattern = SparsePattern.from_mask(mask)
    encoding = data.draw(st.sampled_from(["bits", "columns"]))
    tensors = encode(pattern, encoding)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == layout(
        encoding, pattern.shape, pattern.nnz
    )
    back = decode(encoding, tensors, pattern.shape, pattern.nnz)
    assert torch.equal(back.words, pattern.words)
    assert digest(back) == digest(pattern)
    assert choose_encoding(pattern) in ("bits", "columns")


def test_a_bit_beyond_the_matrix_is_refused():
    pattern = SparsePattern.from_mask(torch.ones(3, 5, dtype=torch.bool))
    bits = encode(pattern, "bits")["bits"]
    assert decode("bits", {"bits": bits}, (3, 5), 15).nnz == 15
    bits[-1] |= 128
    with pytest.raises(ValueError, match="a bit beyond the last of 15 entries"):
        decode("bits", {"bits": bits}, (3, 5), 15)


def test_the_widest_matrices_keep_their_columns():
    """16 bits are read as unsigned, and a row of 65,536 entries is written as bits."""
    for columns in (40_000, 65_535, 65_536):
        mask = torch.zeros(2, columns, dtype=torch.bool)
        mask[0, [1, 32_768, columns - 1]] = True
        pattern = SparsePattern.from_mask(mask)
        encoding = choose_encoding(pattern)
        assert encoding == ("bits" if columns == 65_536 else "columns")
        assert torch.equal(decode(encoding, encode(pattern, encoding), (2, columns), 3).to_mask(), mask)
