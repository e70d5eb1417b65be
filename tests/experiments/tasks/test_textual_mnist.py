import gzip
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from conftest import CHATML, make_tokenizer
from rigsa.errors import RigsaError
from rigsa.experiments.tasks.task import collate
from rigsa.experiments.tasks.textual_mnist import (
    Images,
    PromptDataset,
    Prompts,
    image_text,
    load_splits,
    make_images,
    quantise,
    read_idx,
)  # fmt: skip


def idx_bytes(values: np.ndarray) -> bytes:
    sizes = b"".join(int(size).to_bytes(4, "big") for size in values.shape)
    return bytes([0, 0, 8, values.ndim]) + sizes + values.astype(np.uint8).tobytes()


def write_pair(folder: Path, split: str, count: int, zipped: bool = False, shape: tuple[int, ...] = (5, 4)) -> None:
    pixels = np.random.default_rng(count).integers(0, 256, (count, *shape))
    for name, values in (("images-idx3", pixels), ("labels-idx1", np.arange(count) % 10)):
        data = idx_bytes(values)
        path = folder / f"{split}-{name}-ubyte{'.gz' if zipped else ''}"
        path.write_bytes(gzip.compress(data) if zipped else data)


DAMAGED = bytearray(gzip.compress(idx_bytes(np.arange(4000).reshape(10, 20, 20) % 251)))
DAMAGED[40:60] = bytes(20)


def test_grey_values_become_ten_equal_steps():
    assert quantise(np.array([0, 25, 26, 255]), 255).tolist() == [0, 0, 1, 9]
    assert np.bincount(quantise(np.arange(256), 255)).tolist() == [26, 26, 25, 26, 25, 26, 26, 25, 26, 25]
    assert quantise(np.array([0, 16]), 16).tolist() == [0, 9]


def test_image_text_is_a_line_a_row():
    assert image_text(np.array([[0, 9, 1], [2, 3, 4]], np.uint8)) == "091\n234"


def test_digits_are_split_once_for_all():
    splits = load_splits("digits")
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [1482, 15, 300]
    everything = [image.tobytes() for part in vars(splits).values() for image in part.levels]
    assert len(everything) == 1797
    again = load_splits("digits")
    assert np.array_equal(again.test.levels, splits.test.levels)
    assert splits.test.levels.shape[1:] == (8, 8)
    assert (np.bincount(splits.test.labels, minlength=10) > 15).all()


@pytest.mark.parametrize("zipped", [False, True])
def test_idx_folder_with_both_splits(tmp_path, zipped):
    write_pair(tmp_path, "train", 200, zipped)
    write_pair(tmp_path, "t10k", 30, zipped)
    splits = load_splits(str(tmp_path))
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [198, 2, 30]
    assert splits.test.labels.tolist() == [label % 10 for label in range(30)]


def test_idx_folder_with_one_pair_holds_a_sixth_out(tmp_path):
    write_pair(tmp_path, "t10k", 60)
    assert [len(part) for part in vars(load_splits(str(tmp_path))).values()] == [49, 1, 10]


def test_real_mnist(shared_data):
    splits = load_splits(str(shared_data / "mnist"))
    assert splits.train.levels.shape[1:] == (28, 28)
    assert sum(map(len, vars(splits).values())) == 10_000
    labels = np.concatenate([part.labels for part in vars(splits).values()])
    assert np.bincount(labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no IDX files"),
        ({"t10k-images-idx3-ubyte": idx_bytes(np.zeros((3, 2, 2)))}, "the t10k labels are missing"),
        (
            {"t10k-images-idx3-ubyte": idx_bytes(np.zeros((3, 2, 2)))[:-1], "t10k-labels-idx1-ubyte": b""},
            r"announces \(3, 2, 2\) values and holds 11",
        ),
        ({"t10k-images-idx3-ubyte": b"hello", "t10k-labels-idx1-ubyte": b""}, "not an IDX file of unsigned bytes"),
        ({"t10k-images-idx3-ubyte.gz": b"hello", "t10k-labels-idx1-ubyte": b""}, "cannot read"),
        (
            {
                "t10k-images-idx3-ubyte": idx_bytes(np.zeros((3, 2))),
                "t10k-labels-idx1-ubyte": idx_bytes(np.zeros(3)),
            },
            r"expected grey images \[n, height, width\] of at most 64x64 pixels, got shape \[3, 2\]",
        ),
        (
            {
                "t10k-images-idx3-ubyte": idx_bytes(np.zeros((3, 2, 2))),
                "t10k-labels-idx1-ubyte": idx_bytes(np.full(3, 12)),
            },
            "expected labels 0 to 9, got 12 to 12",
        ),
        ({"t10k-images-idx3-ubyte": b"\0\0\x08\x03\0", "t10k-labels-idx1-ubyte": b""}, "ends within its header"),
        ({"t10k-images-idx3-ubyte": b"\0\0\x08\xff" + bytes(99), "t10k-labels-idx1-ubyte": b""}, "within its header"),
        (
            {"t10k-images-idx3-ubyte": idx_bytes(np.zeros((3, 2, 2))) + b"x", "t10k-labels-idx1-ubyte": b""},
            r"announces \(3, 2, 2\) values and holds more",
        ),
        (
            {"t10k-images-idx3-ubyte": b"\0\0\x08\x03" + b"\xff" * 12, "t10k-labels-idx1-ubyte": b""},
            "expected at most 1073741824",
        ),
        (
            {
                "t10k-images-idx3-ubyte.gz": DAMAGED,
                "t10k-labels-idx1-ubyte": b"",
            },
            "cannot read .*: (Error -3|CRC)",
        ),
        (
            {
                "t10k-images-idx3-ubyte": idx_bytes(np.zeros((2, 2, 2))),
                "t10k-labels-idx1-ubyte": idx_bytes(np.zeros(2)),
            },
            "expected 2 training images or more, .* and a test image or more; got 2 and 0",
        ),
    ],
)
def test_bad_folders_are_named(tmp_path, files, message):
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(RigsaError, match=message):
        load_splits(str(tmp_path))


def test_images_of_two_sizes_and_no_test_images_are_refused(tmp_path):
    write_pair(tmp_path, "train", 20)
    write_pair(tmp_path, "t10k", 6, shape=(5, 5))
    with pytest.raises(RigsaError, match="expected images of one size, got 5x4 to train and 5x5 to test"):
        load_splits(str(tmp_path))
    write_pair(tmp_path, "t10k", 0)
    with pytest.raises(RigsaError, match="got 20 and 0"):
        load_splits(str(tmp_path))


def test_a_small_file_that_unpacks_to_a_huge_one_takes_no_memory(tmp_path):
    header = bytes([0, 0, 8, 3]) + b"".join(size.to_bytes(4, "big") for size in (10, 2, 2))
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    with gzip.open(path, "wb") as file:
        file.write(header)
        for _ in range(300):
            file.write(bytes(2**20))
    tracemalloc.start()
    with pytest.raises(RigsaError, match="holds more"):
        read_idx(path)
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(RigsaError, match="expected a regular file, got a pipe"):
        read_idx(path)


def test_missing_source_is_named():
    with pytest.raises(RigsaError, match=r"--data /nowhere: not a folder. Expected digits, mnist, or a folder"):
        load_splits("/nowhere")
    with pytest.raises(RigsaError, match=r"3 images but labels of shape \[2\]"):
        make_images(np.zeros((3, 2, 2)), np.zeros(2), 255, "x")


def test_hub_without_network_names_the_way_out(monkeypatch):
    import datasets

    def refuse(name: str) -> None:
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(RigsaError, match=r"ylecun/mnist is neither cached nor to be had .* Use --data digits"):
        load_splits("mnist")


def test_hub_dataset_is_read_by_its_columns(monkeypatch):
    import datasets
    from PIL import Image

    def load(name: str):  # type: ignore[no-untyped-def]
        assert name == "ylecun/mnist"
        image = Image.fromarray(np.full((28, 28), 255, np.uint8))
        return {
            split: {"image": [image] * count, "label": [7] * count} for split, count in (("train", 100), ("test", 5))
        }

    monkeypatch.setattr(datasets, "load_dataset", load)
    splits = load_splits("mnist")
    assert [len(part) for part in vars(splits).values()] == [99, 1, 5]
    assert (splits.test.levels == 9).all()


def test_prompt_is_chatml_with_a_prefilled_answer():
    prompts = Prompts(make_tokenizer())
    assert prompts.text(np.array([[1, 2]], np.uint8)) == (
        "<|im_start|>user\n12<|im_end|>\n<|im_start|>assistant\nThe digit is "
    )
    assert (
        Prompts(make_tokenizer(), "").text(np.array([[1, 2]], np.uint8)).startswith("<|im_start|>system\n<|im_end|>\n")
    )


def test_examples_are_earlier_turns():
    shown = Images(np.array([[[3]], [[4]]], np.uint8), np.array([8, 9]))
    text = Prompts(make_tokenizer()).text(np.array([[5]], np.uint8), shown)
    turn = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\nThe digit is {}"
    assert text == turn.format(3, "8<|im_end|>\n") + turn.format(4, "9<|im_end|>\n") + turn.format(5, "")


def test_dataset_pairs_prompts_with_answer_tokens():
    images = Images(np.array([[[5]]], np.uint8), np.array([7]))
    tokenizer = make_tokenizer()
    sample = PromptDataset(images, Prompts(tokenizer))[0]
    assert tokenizer.convert_ids_to_tokens(sample["targets"][0]) == "7"
    assert tokenizer.convert_ids_to_tokens(sample["input_ids"])[-4:] == ["digit", " ", "is", " "]


def test_tokenizers_that_do_not_fit_are_refused():
    bare = make_tokenizer()
    bare.chat_template = bare.eos_token = None
    with pytest.raises(RigsaError, match="its tokenizer has neither a chat template nor an end token"):
        Prompts(bare)
    from tokenizers import Tokenizer, models

    merged = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    fast = PreTrainedTokenizerFast(tokenizer_object=merged, unk_token="<unk>")
    fast.chat_template = CHATML
    with pytest.raises(RigsaError, match="does not make each digit after 'The digit is ' one token"):
        Prompts(fast)


def test_collate_pads_on_the_left_only_where_lengths_differ():
    same = collate([{"input_ids": [1, 2], "targets": [5]}, {"input_ids": [3, 4], "targets": [6]}], pad_id=0)
    assert same.keys() == {"input_ids", "targets"}
    mixed = collate([{"input_ids": [1], "targets": [5]}, {"input_ids": [3, 4], "targets": [4, 6]}], pad_id=9)
    assert mixed["input_ids"].tolist() == [[9, 1], [3, 4]]
    assert mixed["targets"].tolist() == [[-100, 5], [4, 6]]
    assert torch.equal(mixed["attention_mask"], torch.tensor([[0, 1], [1, 1]]))
    assert torch.equal(mixed["position_ids"], torch.tensor([[0, 0], [0, 1]]))
