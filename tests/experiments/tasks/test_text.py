"""Texts of the user's own: what is read, refused, split and learned."""

import csv
import dataclasses
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from texts import byte_tokenizer, pairs, rows, write_jsonl

from conftest import CHATML
from rigsa.errors import RigsaError
from rigsa.experiments.config import Config
from rigsa.experiments.presets import smoke
from rigsa.experiments.tasks.conversation import Conversation
from rigsa.experiments.tasks.encoding import Encoder
from rigsa.experiments.tasks.formats import Example, read_examples, recognise_format
from rigsa.experiments.tasks.registry import load_task, recognise
from rigsa.experiments.tasks.rows import read_rows
from rigsa.experiments.tasks.task import IGNORED
from rigsa.experiments.tasks.text import TextTask

FORMATS = ("prompt-completion", "alpaca", "text", "messages", "sharegpt")


def config_of(data: Path, **options: Any) -> Config:
    return dataclasses.replace(smoke("imp", "cpu"), data=str(data), system_prompt="default", **options)


def task_of(data: Path, tokenizer: Any = None, longest: int | None = 256, **options: Any) -> TextTask:
    task = load_task(config_of(data, **options))
    assert isinstance(task, TextTask)
    task.meet(tokenizer or byte_tokenizer(), longest)
    return task


def write_as(kind: str, folder: Path, lines: list[dict[str, Any]]) -> Path:
    import pyarrow
    from pyarrow import parquet

    path = folder / f"data.{kind}"
    if kind == "jsonl":
        return write_jsonl(path, lines)
    if kind == "jsonl.gz":
        path.write_bytes(gzip.compress("".join(json.dumps(line) + "\n" for line in lines).encode()))
    elif kind == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(lines), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, lines[0])
            writer.writeheader()
            writer.writerows(lines)
    return path


# ---- files and formats


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet", "csv"])
def test_every_kind_of_file_holds_the_same_rows(kind, tmp_path):
    lines = rows("prompt-completion", 5)
    lines[2]["prompt"] = "two\nlines, and a comma"
    path = write_as(kind, tmp_path, lines)
    assert [row for _, row in read_rows(path)] == lines
    place = read_rows(path)[4][0]
    assert place == {"parquet": f"{path}, row 5", "csv": f"{path}, line 7"}.get(kind, f"{path}, line 5")


@pytest.mark.parametrize("format_name", FORMATS)
def test_a_format_is_recognised_printed_and_written_down(format_name, tmp_path):
    path = write_jsonl(tmp_path / "data.jsonl", rows(format_name))
    assert recognise(config_of(path)).format == format_name
    task = task_of(path)
    assert f"data.jsonl ({format_name}): " in task.describe()
    assert (task.num_training, len(task.validation()), len(task.tests()["held-out"])) == tuple(
        len(task.splits[split]) for split in ("train", "validation", "test")
    )


def test_formats_say_the_same(tmp_path):
    """All but the plain text have one conversation for each row, and Alpaca's begins with its instruction."""
    found = {
        name: [one.turns for one in read_examples([("x", row) for row in rows(name, 6)], name)] for name in FORMATS
    }
    assert found["messages"] == found["sharegpt"] == found["prompt-completion"]
    assert [(turns[0]["content"], turns[1]["content"]) for turns in found["messages"]] == pairs(6)
    assert [turns[0]["content"] for turns in found["alpaca"]] == [f"Answer.\n\n{question}" for question, _ in pairs(6)]
    (one,) = read_examples([("x", {"question": "a", "answer": "b"})], "prompt-completion")
    assert [turn["content"] for turn in one.turns] == ["a", "b"]
    parts = {
        "prompt": [{"role": "user", "content": [{"type": "text", "text": "a"}]}],
        "completion": [{"role": "assistant", "content": "b"}],
    }
    (two,) = read_examples([("x", parts)], "prompt-completion")
    assert two.turns == one.turns


def test_several_formats_need_to_be_told_apart(tmp_path):
    path = write_jsonl(tmp_path / "data.jsonl", [row | {"text": "x y"} for row in rows("messages")])
    with pytest.raises(RigsaError, match=r"line 1: .* its columns fit messages and text; say which with --format"):
        load_task(config_of(path))
    assert task_of(path, format="messages").format == "messages"
    with pytest.raises(RigsaError, match="expected rows, got none"):
        recognise_format([], "x")
    with pytest.raises(RigsaError, match=r"alpaca \(instruction and output\).*\(prompt and completion or question"):
        recognise_format([("x", {"input": "a"})], "x")


USER, SAYS = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
CALLS = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "f"}}]}
TOOL = {"role": "tool", "content": "7"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"line 3: not JSON"),
        ("[1]", r"line 3: expected an object with columns, got \[1\]"),
        ({"prompt": "a"}, r"line 3: expected the columns of the format messages \(messages\), got prompt"),
        ({"messages": None}, r"line 3: expected the columns of the format messages \(.*\), got messages \(null\)"),
        ({"messages": []}, r"line 3, column messages: expected a list of turns"),
        ({"messages": [SAYS, USER]}, r"line 3: roles out of order; expected system or user .*, got assistant"),
        ({"messages": [USER, USER, SAYS]}, r"line 3: roles out of order; expected assistant after user, got user"),
        ({"messages": [USER, TOOL, SAYS]}, r"line 3: roles out of order"),
        ({"messages": [USER, CALLS, USER, SAYS]}, r"expected tool after the assistant calls a tool, got user"),
        ({"messages": [USER]}, r"line 3: expected the assistant's turn at the end, got user"),
        ({"messages": [USER, {"role": "assistant", "content": " "}]}, r"line 3: the answer is empty"),
        ({"messages": [{"role": "user", "content": ""}, SAYS]}, r"line 3: what the user says is empty"),
        ({"messages": [{"role": "owl", "content": "a"}, SAYS]}, r"line 3, column messages: expected a role among"),
        ({"messages": [{"role": "user", "content": 7}, SAYS]}, r"line 3, column messages: expected text in content"),
        ({"messages": [{"role": "user", "content": "\ud800"}, SAYS]}, r"line 3: expected text, got half a character"),
        ({"messages": [USER, SAYS], "tools": "{"}, r"line 3, column tools: not JSON"),
        ({"messages": [USER, SAYS], "tools": [1]}, r"line 3, column tools: expected a list of functions"),
        (b'{"messages": "\xff"}', r"line 3: expected text in UTF-8, got the byte 0xff"),
    ],
)  # fmt: skip
def test_a_bad_row_is_refused_by_file_and_line(line, message, tmp_path):
    path = write_jsonl(tmp_path / "data.jsonl", rows("messages", 2))
    bad = line if isinstance(line, bytes) else line.encode() if isinstance(line, str) else json.dumps(line).encode()
    path.write_bytes(path.read_bytes() + bad + b"\n")
    with pytest.raises(RigsaError, match=f"--data: .*data.jsonl, {message}" if message.startswith("line") else message):
        load_task(config_of(path))


def test_bad_files_are_refused(tmp_path):
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(b'{"text": "a"}\n' * 100)[:-12])
    with pytest.raises(RigsaError, match=r"--data: cannot read .*cut.jsonl.gz: Compressed file ended"):
        load_task(config_of(cut))
    bad = tmp_path / "bad.csv"
    bad.write_text('prompt,completion\na,b\n"a,b\n')
    with pytest.raises(RigsaError, match=r"bad.csv, line 3: not CSV"):
        load_task(config_of(bad))
    bad.write_text("prompt,completion\na,b,c\n")
    with pytest.raises(RigsaError, match=r"bad.csv, line 2: expected 2 columns, got 3"):
        load_task(config_of(bad))
    parquet = tmp_path / "bad.parquet"
    parquet.write_bytes(b"PAR1 and no more")
    with pytest.raises(RigsaError, match=r"bad.parquet cannot be read as Parquet"):
        load_task(config_of(parquet))
    with pytest.raises(RigsaError, match=r"^--data: .*nowhere.jsonl is missing"):
        load_task(config_of(tmp_path / "nowhere.jsonl"))
    (tmp_path / "file.txt").write_text("a")
    with pytest.raises(RigsaError, match=r"file.txt: expected a file that ends in .jsonl"):
        load_task(config_of(tmp_path / "file.txt"))


# ---- splits


def test_a_split_is_fixed_by_the_prompt_alone(tmp_path):
    lines = rows("prompt-completion", 60)
    whole = load_task(config_of(write_jsonl(tmp_path / "a.jsonl", lines)))
    fewer = load_task(config_of(write_jsonl(tmp_path / "b.jsonl", lines[::-1][:50])))
    place = {one.turns[0]["content"]: split for split, examples in whole.splits.items() for one in examples}
    assert len(place) == 60
    for split, examples in fewer.splits.items():
        assert {place[one.turns[0]["content"]] for one in examples} == {split}
    answers = [row | {"completion": "another"} for row in lines]
    other = load_task(config_of(write_jsonl(tmp_path / "c.jsonl", lines + answers)))
    for split, examples in other.splits.items():
        assert {one.turns[0]["content"] for one in examples} == {one.turns[0]["content"] for one in whole.splits[split]}


@given(share=st.floats(0.05, 0.4), number=st.integers(40, 60))
def test_splits_share_nothing_and_lose_nothing(share, number):
    from rigsa.experiments.tasks.text import _split

    examples = [Example(str(n), text=f"text {n}") for n in range(number)]
    if not all(any(at <= one.share() / share < at + 1 for one in examples) for at in (0, 1)):
        return  # a split would be empty, which is refused
    splits, twice = _split({"train": examples}, share, "x")
    found = [one.text for split in splits.values() for one in split]
    assert sorted(found) == sorted(one.text for one in examples)
    assert twice == 0


def test_files_of_a_folder_are_the_splits_and_what_stands_in_two_is_left_out(tmp_path):
    lines = rows("prompt-completion", 40)
    write_jsonl(tmp_path / "train.jsonl", lines[:30])
    write_jsonl(tmp_path / "dev.jsonl", lines[28:36])
    write_jsonl(tmp_path / "test.jsonl", lines[34:])
    task = task_of(tmp_path)
    assert [len(task.splits[split]) for split in ("train", "validation", "test")] == [28, 6, 6]
    assert "4 left out, as their prompt stands in another split, too" in task.describe()
    (tmp_path / "test.jsonl").write_text("")
    with pytest.raises(RigsaError, match="expected examples in the test split, got none"):
        load_task(config_of(tmp_path))
    write_jsonl(tmp_path / "valid.jsonl", lines)
    with pytest.raises(RigsaError, match=r"expected one file for validation, got valid.jsonl and dev.jsonl"):
        load_task(config_of(tmp_path))
    with pytest.raises(RigsaError, match=r"no example of 2 is left for the .* split"):
        load_task(config_of(write_jsonl(tmp_path / "two" / "two.jsonl", lines[:2])))


# ---- tokens


def learned(sample: dict[str, list[int]], tokenizer: Any) -> str:
    """What is learned of a sample, as text."""
    return tokenizer.decode([token for token in sample["targets"] if token != IGNORED])


def encode(example: Example, tokenizer: Any = None, covers: str = "answer", longest: int | None = None) -> Any:
    return Encoder(Conversation(tokenizer or byte_tokenizer()), covers, longest).encode(example)


CHAT = Example("x", ({"role": "system", "content": "Be brief."}, USER, SAYS, {"role": "user", "content": "c 12"},
                     {"role": "assistant", "content": "the 12 is"}))  # fmt: skip


def test_the_assistants_turns_and_their_ends_are_learned():
    tokenizer = byte_tokenizer()
    sample = encode(CHAT, tokenizer).sample
    assert learned(sample, tokenizer) == "b<|im_end|>the 12 is<|im_end|>"
    whole = tokenizer.apply_chat_template(list(CHAT.turns), tokenize=False).rstrip("\n")
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert sample["input_ids"] == ids[:-1]
    assert [token for token in sample["targets"] if token != IGNORED] == [
        token for token, target in zip(ids[-len(sample["targets"]) :], sample["targets"], strict=True)
        if target != IGNORED
    ]  # fmt: skip
    assert encode(CHAT, tokenizer, "all").sample["targets"] == ids[1:]


def test_an_answer_begins_where_the_model_is_asked_for_one():
    """What stands before the targets is the prompt that generation starts from."""
    tokenizer = byte_tokenizer()
    encoder = Encoder(Conversation(tokenizer), "answer", None)
    example = Example("x", (USER, {"role": "assistant", "content": "the end"}))
    sample = encoder.encode(example).sample
    assert sample["input_ids"][: len(sample["input_ids"]) - len(sample["targets"]) + 1] == encoder.prompt(example)


@pytest.mark.parametrize("adds_bos", [False, True])
def test_a_base_model_reads_plain_lines_and_learns_to_stop(adds_bos):
    tokenizer = byte_tokenizer(template=None, adds_bos=adds_bos)
    conversation = Conversation(tokenizer)
    assert conversation.is_plain
    encoder = Encoder(conversation, "answer", None)
    example = Example("x", (USER, SAYS))
    sample = encoder.encode(example).sample
    begin = "<s>" if adds_bos else ""
    assert tokenizer.decode(sample["input_ids"]) == f"{begin}a\nb"
    assert learned(sample, tokenizer) == "b</s>"
    assert tokenizer.decode(encoder.prompt(example)) == f"{begin}a\n"
    text = encoder.encode(Example("x", text="a b")).sample
    assert tokenizer.decode(text["input_ids"]) == f"{begin}a b"
    assert learned(text, tokenizer) == ("a b</s>" if adds_bos else " b</s>")
    assert [conversation.ids([USER])[0] == 0, tokenizer.chat_template] == [adds_bos, None]


REWRITES = CHATML.replace(
    "{{ message['content'] }}", "{{ message['content'] if loop.last or message.role != 'assistant' else '...' }}"
)


def test_a_template_that_rewrites_earlier_turns_is_learned_in_the_last_and_said(tmp_path):
    tokenizer = byte_tokenizer(template=REWRITES)
    encoded = encode(CHAT, tokenizer)
    assert learned(encoded.sample, tokenizer) == "the 12 is<|im_end|>"
    assert encoded.last_turn_only
    path = write_jsonl(
        tmp_path / "data.jsonl", [{"messages": [*turns["messages"], USER, SAYS]} for turns in rows("messages")]
    )
    assert "40 learned in the last turn only" in task_of(path, tokenizer).describe()


def test_a_template_without_an_end_gets_one():
    tokenizer = byte_tokenizer(
        template="{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}"
        "assistant: {% endif %}"
    )
    assert learned(encode(Example("x", (USER, SAYS)), tokenizer).sample, tokenizer) == "b\n<|im_end|>"


TOOLS = CHATML.replace(
    "{{ message['content'] }}",
    "{{ message['content'] or '' }}{% for c in message.tool_calls or [] %}call {{ c.function.name }}{% endfor %}",
)


def test_tool_calls_need_a_template_that_takes_them():
    example = read_examples(
        [("f.jsonl, line 1", {"messages": [USER, CALLS, TOOL, SAYS], "tools": '[{"name": "f"}]'})], "messages"
    )[0]
    with pytest.raises(
        RigsaError, match=r"f.jsonl, line 1: calls tools, which the model's chat template does not know"
    ):
        encode(example)
    tokenizer = byte_tokenizer(template=TOOLS)
    assert learned(encode(example, tokenizer).sample, tokenizer) == "call f<|im_end|>b<|im_end|>"


def test_what_the_tokenizer_or_the_template_refuses_is_named():
    bad = Example("f.jsonl, line 9", (USER, {"role": "assistant", "content": "a<|im_end|>b"}))
    with pytest.raises(RigsaError, match=r"f.jsonl, line 9: what the assistant says holds '<\|im_end\|>'"):
        encode(bad)
    refuses = byte_tokenizer(template="{{ raise_exception('no systems here') }}")
    with pytest.raises(RigsaError, match=r"f.jsonl, line 9: the chat template refuses it \(no systems here\)"):
        encode(Example("f.jsonl, line 9", (USER, SAYS)), refuses)


def test_what_is_cut_and_what_is_lost_by_that_is_counted(tmp_path):
    lines = rows("prompt-completion", 40)
    long = {"prompt": "x" * 300, "completion": "y"}
    answer = {"prompt": "x", "completion": "y" * 300}
    path = write_jsonl(tmp_path / "train.jsonl", [*lines, long, answer])
    task = task_of(tmp_path, validation_share=0.2, max_length=120)
    assert "1 cut at the longest length; 1 left out, as the cut takes all of the answer" in task.describe()
    lengths = [length for samples in task.samples.values() for length in samples.lengths]
    assert max(lengths) == 119
    assert len(lengths) == 41
    with pytest.raises(RigsaError, match=r"nothing that is learned is left of the .* train examples"):
        task_of(path.parent, max_length=3)


@given(
    st.lists(st.tuples(st.text(min_size=1), st.text(min_size=1)), min_size=1, max_size=3),
    st.sampled_from(["answer", "all"]),
)
def test_samples_are_whole_conversations_and_learn_all_answers(said, covers):
    """Whatever people say: decoded, the ids are the template's text, and what is learned ends each turn."""
    tokenizer = byte_tokenizer()
    turns = [
        turn
        for asked, answer in said
        for turn in ({"role": "user", "content": asked}, {"role": "assistant", "content": answer})
    ]
    if not all(turn["content"].strip() for turn in turns):
        return
    sample = encode(Example("x", tuple(turns)), tokenizer, covers).sample
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    ids = [*sample["input_ids"], sample["targets"][-1]]
    assert tokenizer.decode(ids) == text.removesuffix("\n")
    if covers == "answer":
        assert learned(sample, tokenizer) == "".join(f"{turn['content']}<|im_end|>" for turn in turns[1::2])
    else:
        assert sample["targets"] == ids[1:]


# ---- data sets of the hub


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A data set as the hub holds it: files by split, and a card that says where they are."""
    import pyarrow
    from pyarrow import parquet

    folder = tmp_path / "owner" / "questions"
    (folder / "data").mkdir(parents=True)
    for split, lines in (("train", rows("messages", 30)), ("test", rows("messages", 45)[40:])):
        parquet.write_table(pyarrow.Table.from_pylist(lines), folder / "data" / f"{split}-00000-of-00001.parquet")
    card = (
        "---\nconfigs:\n- config_name: default\n  data_files:\n"
        + "".join(f"  - split: {split}\n    path: data/{split}-*\n" for split in ("train", "test"))
        + "---\n"
    )
    (folder / "README.md").write_text(card)
    return folder


def test_a_data_set_of_the_hub_is_read_by_datasets(repository, tmp_path, monkeypatch):
    """`datasets` itself reads it, from a folder in the layout of the hub, which stands in for the network."""
    import datasets

    load = datasets.load_dataset
    place = {"owner/questions": str(repository)}
    monkeypatch.setattr(datasets, "load_dataset", lambda name: load(place[name], cache_dir=str(tmp_path / "cache")))
    config = config_of(Path("owner/questions"))
    assert config.is_text
    assert recognise(config).format == "messages"
    task = task_of(Path("owner/questions"))
    assert task.num_training + len(task.validation()) == 30
    assert len(task.tests()["held-out"]) == 5
    assert task.splits["test"][0].place == "owner/questions, test row 1"
    assert [turn["content"] for turn in task.splits["test"][0].turns] == list(pairs(45)[40])


def test_a_data_set_that_is_not_to_be_had_is_named_with_the_reason(repository, monkeypatch):
    import datasets

    with pytest.raises(RigsaError, match=r"--data no/such: no such file or folder, and no data set .* \(.*no/such"):
        load_task(config_of(Path("no/such"), format="messages"))
    load = datasets.load_dataset
    (repository / "data" / "train-00000-of-00001.parquet").unlink()
    card = (repository / "README.md").read_text()
    (repository / "README.md").write_text(card.replace("  - split: train\n    path: data/train-*\n", ""))
    monkeypatch.setattr(datasets, "load_dataset", lambda name: load(str(repository)))
    with pytest.raises(RigsaError, match=r"--data owner/questions: expected a split named train, got test"):
        load_task(config_of(Path("owner/questions"), format="messages"))
