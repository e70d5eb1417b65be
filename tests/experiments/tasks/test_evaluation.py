import pytest
import torch
import torch.nn.functional as F

from conftest import make_llama
from rigsa.experiments.tasks.evaluation import answer_logits, training_loss


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
        log_probabilities.append(logits.gather(1, ids[1:, None]))
        answers.append(log_probabilities[-1][-1])
    torch.testing.assert_close(training_loss(model, samples, "all"), -torch.cat(log_probabilities).mean())
    torch.testing.assert_close(training_loss(model, samples, "answer"), -torch.cat(answers).mean())
    assert F.cross_entropy(answer_logits(model, samples), samples["answer"]) == training_loss(model, samples, "answer")
