import pytest
import torch
import torch.nn.functional as F
from transformers import GPTNeoConfig, GPTNeoForCausalLM

from conftest import make_llama
from rigsa.experiments.tasks.evaluation import answer_logits, training_loss
from rigsa.experiments.tasks.textual_mnist import collate


def batch(padded: bool) -> dict[str, torch.Tensor]:
    ids, answer = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]]), torch.tensor([13, 14])
    if not padded:
        return {"input_ids": ids, "answer": answer}
    present = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    return {"input_ids": ids * present, "answer": answer, "attention_mask": present}


def test_answer_logits_are_those_of_the_last_position():
    model = make_llama()
    torch.testing.assert_close(answer_logits(model, batch(False)), model(batch(False)["input_ids"]).logits[:, -1])


def test_padding_on_the_left_does_not_change_the_answer():
    model = make_llama()
    whole = answer_logits(model, {"input_ids": torch.tensor([[6, 7, 8]])})
    torch.testing.assert_close(answer_logits(model, batch(True))[:1], whole, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("padded", [False, True])
def test_losses_cover_what_they_say(padded):
    model, samples = make_llama(), batch(padded)
    log_probabilities, answers = [], []
    for row in range(2):
        present = samples.get("attention_mask", torch.ones(2, 4).long())[row].bool()
        ids = torch.cat([samples["input_ids"][row][present], samples["answer"][row : row + 1]])
        logits = model(ids[None, :-1]).logits[0].log_softmax(-1)
        every = logits.gather(1, ids[1:, None])
        log_probabilities.append(every.mean())
        answers.append(every[-1])
    torch.testing.assert_close(training_loss(model, samples, "all"), -torch.stack(log_probabilities).mean())
    torch.testing.assert_close(training_loss(model, samples, "answer"), -torch.cat(answers).mean())
    assert F.cross_entropy(answer_logits(model, samples), samples["answer"]) == training_loss(model, samples, "answer")


def unequal(*lengths: int) -> list[dict[str, object]]:
    drawn = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(5, 15, (n,), generator=drawn).tolist(), "answer": 7} for n in lengths]


@pytest.mark.parametrize("covers", ["answer", "all"])
def test_the_gradient_of_a_batch_does_not_depend_on_the_micro_batch(covers):
    """Prompts of unequal length, as the Trainer has it: the loss is divided by the number of micro-batches."""
    gradients = []
    for micro in (4, 2, 1):
        model = make_llama().double()
        samples = unequal(3, 30, 5, 40)
        for start in range(0, 4, micro):
            (training_loss(model, collate(samples[start : start + micro], 0), covers) / (4 // micro)).backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    torch.testing.assert_close(gradients[1], gradients[0])
    torch.testing.assert_close(gradients[2], gradients[0])


@pytest.mark.parametrize("covers", ["answer", "all"])
def test_padding_moves_no_learned_position(covers):
    """A model with learned absolute positions says of a prompt beside a longer one what it says of it alone."""
    torch.manual_seed(0)
    config = GPTNeoConfig(
        vocab_size=32, hidden_size=16, num_layers=2, num_heads=2, max_position_embeddings=64,
        attention_types=[[["global"], 2]], initializer_range=0.3,
    )  # fmt: skip
    model = GPTNeoForCausalLM(config).eval()
    short, long = unequal(4, 12)
    with torch.no_grad():
        alone, beside = (answer_logits(model, collate(batch, 0))[0] for batch in ([short], [short, long]))
        losses = [training_loss(model, collate(batch, 0), covers) for batch in ([short], [long], [short, long])]
    torch.testing.assert_close(beside, alone, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close((losses[0] + losses[1]) / 2, losses[2])
