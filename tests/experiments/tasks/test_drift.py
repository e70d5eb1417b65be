"""Drift from the base model: its prompts, the base's replies, the switch back to the base, the divergence."""

import copy
import json
import math

import pytest
import torch
from torch import nn

from conftest import make_llama, make_tokenizer
from rigsa.adapters import adapter_off
from rigsa.experiments.attach import attach_adapter
from rigsa.experiments.config import OPTIONS
from rigsa.experiments.model import load_model
from rigsa.experiments.presets import quickstart
from rigsa.experiments.tasks.conversation import Conversation
from rigsa.experiments.tasks.drift import drift, drift_prompts, replies
from rigsa_kernels import SparsePattern, gated_linears, replace_linears

IDS = torch.arange(17)[None]


def open_gates(model: nn.Module, alpha: float) -> None:
    with torch.no_grad():
        for layer in gated_linears(model).values():
            layer.rigsa_alpha.fill_(alpha)


def dense(model: nn.Module) -> None:
    replace_linears(model, alpha_init=0.5)


def ticket(model: nn.Module) -> None:
    replace_linears(model, alpha_init=0.5)
    for layer in gated_linears(model).values():
        mask = torch.rand(layer.weight.shape, generator=torch.Generator().manual_seed(1)) < 0.3
        layer.set_pattern(SparsePattern.from_mask(mask))


def lora(model: nn.Module) -> None:
    peft = pytest.importorskip("peft")
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.1), model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    model.eval()


def dense_and_lora(model: nn.Module) -> None:
    replace_linears(model, include="*mlp*", alpha_init=0.5)
    peft = pytest.importorskip("peft")
    peft.inject_adapter_in_model(
        peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False), model
    )
    model.eval()


ADAPTERS = [dense, ticket, lora, dense_and_lora]


def trainable(model: nn.Module) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(IDS).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attach", ADAPTERS)
def test_switched_off_the_model_is_its_base_bit_for_bit(attach, dtype):
    model = make_llama().to(dtype)
    base = logits(model)
    attach(model)
    adapted, flags = logits(model), trainable(model)
    assert not torch.equal(adapted, base)
    with adapter_off(model):
        assert torch.equal(logits(model), base)
        with adapter_off(model):
            assert torch.equal(logits(model), base)
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), adapted)
    assert trainable(model) == flags


@pytest.mark.parametrize("attach", ADAPTERS)
def test_an_exception_switches_it_on_again(attach):
    model = make_llama()
    attach(model)
    frozen = next(parameter for parameter in model.parameters() if parameter.requires_grad).requires_grad_(False)
    adapted, flags = logits(model), trainable(model)
    with pytest.raises(KeyboardInterrupt), adapter_off(model):
        raise KeyboardInterrupt
    assert torch.equal(logits(model), adapted)
    assert trainable(model) == flags
    assert not frozen.requires_grad


def test_prompts_are_two_dozen_different_lines():
    prompts = drift_prompts()
    assert len(prompts) == len(set(prompts)) == 24
    assert all(prompt == prompt.strip() and prompt for prompt in prompts)


@torch.no_grad()
def greedy_by_hand(model: nn.Module, ids: list[int], ends: set[int], count: int) -> list[int]:
    """No cache, no padding."""
    reply: list[int] = []
    while len(reply) < count and not (reply and reply[-1] in ends):
        reply.append(int(model(torch.tensor([ids + reply])).logits[0, -1].argmax()))
    return reply


def make_talker() -> nn.Module:
    """Large weights, so that replies differ."""
    return make_llama(initializer_range=0.4)


def test_replies_are_greedy_and_hold_their_end_token():
    """Both the tokenizer's (2) and the model's."""
    model, tokenizer = make_talker(), make_tokenizer()
    model.generation_config.eos_token_id = [15, 16]
    found = replies(model, Conversation(tokenizer, ""), 12)
    assert [reply["prompt"] for reply in found] == drift_prompts()
    assert replies(model, Conversation(tokenizer, ""), 12, count=8) == found[:8]
    assert OPTIONS["drift_prompts"].default == OPTIONS["drift_prompts"].metadata["bound"].most == len(found)
    for reply in found:
        turns = [{"role": "system", "content": ""}, {"role": "user", "content": reply["prompt"]}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        assert reply["prompt_ids"] == tokenizer(text)["input_ids"]
        assert reply["reply_ids"] == greedy_by_hand(model, reply["prompt_ids"], {2, 15, 16}, 12)
    assert {reply["reply_ids"][-1] for reply in found} > {2, 15, 16}
    assert max(len(reply["reply_ids"]) for reply in found) == 12
    assert json.loads(json.dumps(found)) == found
    assert replies(model, Conversation(tokenizer, ""), 12) == found


def test_replies_ignore_how_the_model_would_rather_generate(recwarn, caplog):
    model, tokenizer = make_talker(), make_tokenizer()
    want = replies(model, Conversation(tokenizer), 6)
    own = model.generation_config
    own.do_sample, own.temperature, own.repetition_penalty, own.no_repeat_ngram_size = True, 3.0, 5.0, 1
    assert replies(model, Conversation(tokenizer), 6) == want
    assert model.generation_config is own
    assert not recwarn.list
    assert not caplog.records


def base_replies() -> list[dict]:
    """Of different lengths, as real ones are."""
    found = replies(make_talker(), Conversation(make_tokenizer()), 7)
    return [reply | {"reply_ids": reply["reply_ids"][: 1 + index % 7]} for index, reply in enumerate(found)]


def test_an_untouched_adapter_has_not_moved_at_all():
    model, found = make_llama(), base_replies()
    replace_linears(model, alpha_init=0.0)
    tokens = sum(len(reply["reply_ids"]) for reply in found)
    assert drift(model, found, 5) == {"kl": 0.0, "stderr": 0.0, "tokens": tokens, "prompts": 24}


@torch.no_grad()
def kl_by_hand(base: nn.Module, adapted: nn.Module, reply: dict) -> list[float]:
    """Token by token, from the definition."""
    found = []
    for position in range(len(reply["reply_ids"])):
        ids = torch.tensor([reply["prompt_ids"] + reply["reply_ids"][:position]])
        p, q = (model(ids).logits[0, -1].softmax(-1).tolist() for model in (base, adapted))
        found.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    return found


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("batch_size", [1, 5, 24])
def test_drift_is_what_its_definition_says(batch_size, dtype, tolerance):
    """The adapted weights are composed here, in a second model in float64."""
    model, base, adapted = make_llama().to(dtype), make_llama().double(), make_llama().double()
    replace_linears(model, alpha_init=0.5)
    with torch.no_grad():
        for name, layer in gated_linears(model).items():
            adapted.get_submodule(name).weight += 0.5 * layer.delta().double()
    found = base_replies()
    by_prompt = [kl_by_hand(base, adapted, reply) for reply in found]
    tokens = sum(map(len, by_prompt))
    kl = sum(map(sum, by_prompt)) / tokens
    # As the weighted mean of the prompts' means, with weights w_i = n_i / sum(n).
    variance = sum((len(kls) / tokens) ** 2 * (sum(kls) / len(kls) - kl) ** 2 for kls in by_prompt) * 24 / 23
    got = drift(model, found, batch_size)
    assert kl > 1e-3
    assert got["kl"] == pytest.approx(kl, rel=tolerance)
    assert got["stderr"] == pytest.approx(math.sqrt(variance), rel=tolerance)
    assert (got["tokens"], got["prompts"]) == (tokens, 24)


def test_drift_grows_with_the_gate_and_leaves_the_model_as_it_was():
    model, found = make_llama(), base_replies()
    replace_linears(model)
    grown = []
    for alpha in (0.0, 1e-6, 1e-3, 0.1, 1.0):
        open_gates(model, alpha)
        before, state = logits(model), copy.deepcopy(model.state_dict())
        grown.append(drift(model, found, 8)["kl"])
        assert torch.equal(logits(model), before)
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert grown == sorted(set(grown))
    assert grown[0] == 0


def test_the_head_sees_replies_only():
    model, found, seen = make_llama(), base_replies(), []
    replace_linears(model)
    model.lm_head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[:2]))
    drift(model, found, 10)
    passes = [found[:10], found[10:20], found[20:]]
    longest = [max(len(reply["reply_ids"]) for reply in batch) for batch in passes]
    assert seen == [(len(batch), n) for batch, n in zip(passes, longest, strict=True) for _ in ("adapted", "base")]


def test_one_reply_has_no_standard_error():
    with pytest.raises(ValueError, match="replies: expected two or more, got 1"):
        drift(make_llama(), base_replies()[:1], 8)


@pytest.mark.model
def test_a_real_model_moves_with_its_gates():
    config = quickstart()
    model, tokenizer = load_model(config, torch.device("cpu"))
    found = replies(model, Conversation(tokenizer, config.system_prompt), 4)[:6]
    attach_adapter(model, config)
    open_gates(model, 0.0)
    assert drift(model, found, 6)["kl"] == 0
    open_gates(model, 0.2)
    assert drift(model, found, 6)["kl"] > 0.01
