import pytest
import torch
from transformers import GPTNeoConfig, GPTNeoForCausalLM

from conftest import WORDS, make_llama
from rigsa.experiments.tasks import evaluation
from rigsa.experiments.tasks.evaluation import evaluate, target_logits, training_loss
from rigsa.experiments.tasks.task import IGNORED, collate, num_targets
from rigsa.experiments.tasks.text import TextSamples


def unequal(*lengths: int, learned: int = 1) -> list[dict[str, list[int]]]:
    """Prompts of these lengths, of which the last `learned` tokens and one more, 7, are to be predicted."""
    drawn = torch.Generator().manual_seed(0)
    rows = [torch.randint(5, 15, (length,), generator=drawn).tolist() for length in lengths]
    return [{"input_ids": row, "targets": [*row[len(row) - learned + 1 :], 7]} for row in rows]


def by_hand(model: torch.nn.Module, sample: dict[str, list[int]]) -> torch.Tensor:
    """Log-probability of each target, from the sample alone."""
    logits = model(torch.tensor([sample["input_ids"]])).logits[0].log_softmax(-1)
    targets = torch.tensor(sample["targets"])
    return logits[-len(targets) :].gather(1, targets.clamp(min=0)[:, None])[targets != IGNORED].flatten()


@pytest.mark.parametrize("learned", [1, 3])
@pytest.mark.parametrize("lengths", [(4, 4), (3, 9)])
@torch.no_grad()
def test_loss_and_accuracy_are_those_of_the_targets(lengths, learned):
    model, samples = make_llama(), unequal(*lengths, learned=learned)
    samples[0]["targets"][0] = IGNORED if learned > 1 else 7
    found = torch.cat([by_hand(model, sample) for sample in samples])
    batch = collate(samples, 0)
    torch.testing.assert_close(training_loss(model, batch), -found.mean())
    torch.testing.assert_close(training_loss(model, batch, 50), -found.sum() / 50)
    assert num_targets(batch) == len(found)
    got = evaluate(model, TextSamples(samples, 0), 1, "x")
    assert got["loss"] == pytest.approx(-found.mean().item(), rel=1e-5)
    assert got["perplexity"] == pytest.approx((-found.mean()).exp().item(), rel=1e-5)
    assert (got["tokens"], got["examples"]) == (len(found), 2)


@pytest.mark.parametrize(
    ("most", "shapes"), [(10**9, [(5, 3)]), (2 * 3 * len(WORDS), [(2, 3), (2, 3), (1, 3)]), (1, [(1, 3)] * 5)]
)
def test_long_answers_are_tested_in_more_passes_with_the_same_results(most, shapes, monkeypatch):
    model, samples = make_llama(), TextSamples(unequal(4, 9, 5, 5, 7, learned=3), 0)
    whole, seen = evaluate(model, samples, 8, "x"), []
    monkeypatch.setattr(evaluation, "MOST_LOGITS", most)
    monkeypatch.setattr(
        evaluation, "target_logits", lambda *given: (seen.append(given[1]["targets"].shape), target_logits(*given))[1]
    )
    assert evaluate(model, samples, 8, "x") == pytest.approx(whole, rel=1e-6)
    assert seen == shapes


@pytest.mark.parametrize("learned", [1, 3])
def test_the_gradient_of_a_step_does_not_depend_on_the_micro_batch(learned):
    """Examples of unequal length, of which unequal numbers of tokens are learned."""
    gradients = []
    for micro in (4, 2, 1):
        model = make_llama().double()
        samples = unequal(3, 30, 5, 40, learned=learned)
        samples[1]["targets"] = samples[1]["targets"][-1:]
        batches = [collate(samples[start : start + micro], 0) for start in range(0, 4, micro)]
        for batch in batches:
            training_loss(model, batch, sum(map(num_targets, batches))).backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    torch.testing.assert_close(gradients[1], gradients[0])
    torch.testing.assert_close(gradients[2], gradients[0])


@pytest.mark.parametrize("learned", [1, 3])
def test_padding_moves_no_learned_position(learned):
    """A model with learned absolute positions says of a prompt beside a longer one what it says of it alone."""
    torch.manual_seed(0)
    config = GPTNeoConfig(
        vocab_size=32, hidden_size=16, num_layers=2, num_heads=2, max_position_embeddings=64,
        attention_types=[[["global"], 2]], initializer_range=0.3,
    )  # fmt: skip
    model = GPTNeoForCausalLM(config).eval()
    short, long = unequal(4, 12, learned=learned)
    with torch.no_grad():
        alone, beside = (target_logits(model, collate(batch, 0))[0] for batch in ([short], [short, long]))
        losses = [training_loss(model, collate(batch, 0)) for batch in ([short], [long], [short, long])]
    torch.testing.assert_close(beside, alone, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close((losses[0] + losses[1]) / 2, losses[2])
