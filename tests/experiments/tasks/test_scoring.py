"""Scores of generated answers, and what of an answer is compared."""

from decimal import Decimal

import pytest
import torch
from texts import byte_tokenizer, family, pairs

from rigsa.experiments.tasks.conversation import Conversation
from rigsa.experiments.tasks.drift import greedy
from rigsa.experiments.tasks.scoring import choice_of, normalised, number_of, score_answers
from rigsa.experiments.train import LikeLengths


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("It is 7.", "7"), ("48/2 = 24\n#### 1,024", "1024"), ("#### 5 and 6", "5"), ("-3.50 or 2 to -3.5", "-3.5"),
        ("none", None), ("#### none of 7", "7"), ("7 #### none", None), (".5", "0.5"), ("2.", "2"),
    ],
)  # fmt: skip
def test_the_number_of_an_answer(answer, number):
    assert number_of(answer) == (None if number is None else Decimal(number))


@pytest.mark.parametrize(
    ("answer", "choice"),
    [("B", "B"), ("(C) as it is", "C"), ("The answer is D.", "D"), ("2) so", "2"), ("Because", None), ("yes", None)],
)
def test_the_choice_of_an_answer(answer, choice):
    assert choice_of(answer) == choice


def test_an_exact_answer_is_equal_but_for_space():
    assert normalised("  a\n b ") == normalised("a b") != normalised("a B")


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("score", ["exact", "number"])
def test_answers_are_what_the_model_says_of_each_prompt_alone(score, batch_size):
    """Half of the right answers are what it says, whatever the batch; the others are not."""
    model, conversation = family("llama").double(), Conversation(byte_tokenizer())
    prompts = [conversation.ids([{"role": "user", "content": question}]) for question, _ in pairs(10)]
    said = [conversation.tokenizer.decode(greedy(model, conversation, [ids], 6)[0], skip_special_tokens=True)
            for ids in prompts]  # fmt: skip
    answers = [text if index % 2 else "another 99991" for index, text in enumerate(said)]
    found = score_answers(
        model, conversation, prompts, answers, score, max_new_tokens=6, longest=256, batch_size=batch_size, label="x"
    )
    right = sum(index % 2 and (score == "exact" or number_of(text) is not None) for index, text in enumerate(said))
    assert found["accuracy"] == pytest.approx(10 * right)
    share = right / 10
    assert found["stderr"] == pytest.approx(100 * (share * (1 - share) / 9) ** 0.5)
    assert found["examples"] == 10


def test_an_answer_stops_where_the_model_can_take_no_more():
    model, conversation = family("llama"), Conversation(byte_tokenizer())
    seen: list[int] = []
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
    score_answers(
        model, conversation, [[7] * 20], ["a"], "exact", max_new_tokens=50, longest=23, batch_size=1, label="x"
    )
    assert sum(seen) <= 23


def test_examples_of_like_length_share_a_batch_and_an_epoch_has_each_once():
    lengths = torch.randint(1, 100, (203,), generator=torch.Generator().manual_seed(0)).tolist()
    sampler = LikeLengths(lengths, 10, seed=3)
    first, again = list(sampler), list(LikeLengths(lengths, 10, seed=3))
    assert first == again
    assert len(first) == len(sampler) == len(set(first)) == 200
    batches = [[lengths[one] for one in first[at : at + 10]] for at in range(0, 200, 10)]
    ranges = [max(batch) - min(batch) for batch in batches]
    assert sum(ranges) <= 100 + 20
    sampler.set_epoch(1)
    assert list(sampler) != first
