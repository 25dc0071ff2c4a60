"""The loader: packed as a slow and obvious packer packs, and never stale."""

import random
import time
from itertools import chain, islice, pairwise
from operator import itemgetter

import numpy as np
import pytest
import torch

import prepare


def slow_rows(tokens, T, passes):
    """Rows of (start, length) of T + 1 tokens together: the words of `pack_rows`, one by one."""
    bounds = [*np.flatnonzero(tokens == tokens[0]).tolist(), len(tokens)]
    unread = ((end - start, start) for _ in range(passes) for start, end in pairwise(bounds))
    buffer = []
    while True:
        row, room = [], T + 1
        while room:
            while len(buffer) < 1000 and (more := list(islice(unread, 128))):
                buffer += more
            if not buffer:
                return
            whole = [document for document in buffer if document[0] <= room]
            # max and min give the first of equals, and the buffer is in the order of reading
            picked = max(whole, key=itemgetter(0)) if whole else min(buffer, key=itemgetter(0))
            buffer.remove(picked)
            length, start = picked
            row.append((start, min(length, room)))
            room -= row[-1][1]
        yield row


def make_tokens(seed, count, longest):
    """The tokens of `count` documents of 2 to `longest` tokens."""
    rng = random.Random(seed)
    documents = [[0] + [rng.randrange(1, 500) for _ in range(rng.randint(1, longest - 1))] for _ in range(count)]
    return np.array([*chain(*documents)], np.uint16)


def split_documents(tokens):
    return np.split(tokens, np.flatnonzero(tokens == tokens[0])[1:])


@pytest.mark.parametrize(
    ("count", "longest", "T"),
    [(3000, 40, 64), (3000, 40, 16), (1500, 500, 64), (1200, 3, 10), (20, 30, 25), (1, 5, 7), (1, 50, 7), (5000, 9, 1)],
)
def test_rows_are_those_of_the_slow_packer(count, longest, T):
    tokens = make_tokens(count, count, longest)
    B, steps = 5, 30
    loader = prepare.batches(tokens, B, T, torch.device("cpu"))
    rows_of_pieces = slow_rows(tokens, T, passes=10**9)
    for x, y, _ in islice(loader, steps):
        pieces = [[tokens[start : start + length] for start, length in row] for row in islice(rows_of_pieces, B)]
        rows = torch.tensor(np.array([np.concatenate(row) for row in pieces]).astype(np.int64))
        assert x.shape == y.shape == (B, T) and x.dtype == y.dtype == torch.int64
        assert torch.equal(x, rows[:, :-1]) and torch.equal(y, rows[:, 1:])


@pytest.mark.parametrize("sigma", [0.3, 1.2, 2.0])
def test_rows_of_many_documents_are_those_of_the_slow_packer(sigma):
    """Long enough for the buffer to fill with documents that are longer than a row, were it refilled one by one."""
    lengths = np.random.default_rng(0).lognormal(np.log(500) - sigma**2 / 2, sigma, 12_000).astype(np.int64) + 2
    tokens = np.ones(lengths.sum(), np.uint16)
    tokens[np.cumsum([0, *lengths[:-1]])] = 0
    rows = [row for row, _ in prepare.pack_rows(tokens, 1023, forever=False)]
    assert rows == list(slow_rows(tokens, 1023, passes=1))


def test_a_worked_example():
    # Rows of 6: the longest that fits 6 is 5 long; then 1 is left, which no document fits, so the shortest is cropped.
    documents = [[0, 11, 12], [0, 21, 22, 23, 24, 25, 26, 27], [0, 31, 32, 33, 34], [0, 41]]
    tokens = np.array([*chain(*documents)], np.uint16)
    rows = [row for row, _ in prepare.pack_rows(tokens, 5, forever=False)]
    assert rows == [[(11, 5), (16, 1)], [(0, 3), (3, 3)]]  # (start, length)


def test_epochs_count_passes():
    tokens = make_tokens(2, 3000, 20)
    seen = [epoch for _, _, epoch in islice(prepare.batches(tokens, 4, 32, torch.device("cpu")), 600)]
    per_epoch = len(tokens) / (4 * 33)  # batches, cropped tokens aside
    assert seen[0] == 1 and seen == sorted(seen)
    assert seen[-1] == pytest.approx(600 / per_epoch, abs=1.2)


def test_the_batches_are_the_same_every_time_and_never_change(cache):
    tokenizer = prepare.Tokenizer.from_directory()
    one, two, val = (prepare.make_dataloader(tokenizer, 4, 64, split) for split in ("train", "train", "val"))
    kept = [(x, y, x.clone(), y.clone()) for x, y, _ in islice(one, 60)]
    time.sleep(0.2)  # the thread goes on filling
    for (x, y, x_then, y_then), (x_again, y_again, _) in zip(kept, two):
        assert torch.equal(x, x_then) and torch.equal(y, y_then)
        assert torch.equal(x, x_again) and torch.equal(y, y_again)
    assert not torch.equal(kept[0][0], next(val)[0])


def test_impossible_shapes_are_refused(cache):
    tokenizer = prepare.Tokenizer.from_directory()
    for B, T, split in ((0, 8, "train"), (1, 0, "train"), (1, 8, "test")):
        with pytest.raises(ValueError):
            prepare.make_dataloader(tokenizer, B, T, split)
    foreign = prepare.Tokenizer.train(iter(["other text"]), 260)
    with pytest.raises(prepare.PrepareError, match="from_directory"):
        prepare.make_dataloader(foreign, 1, 8, "train")


def arrives_as_packed(device, delay=lambda: None, steps=30):
    """Whether the batches on a device are those on the CPU. `delay` is called once the first batches are there."""
    tokens = make_tokens(3, 3000, 50)
    expected = islice(prepare.batches(tokens, 8, 64, torch.device("cpu")), steps)
    loader = prepare.batches(tokens, 8, 64, device)
    arrived = list(islice(loader, prepare.PREFETCH))
    delay()
    arrived += islice(loader, steps - len(arrived))
    return all(
        torch.equal(x.cpu(), ref_x) and torch.equal(y.cpu(), ref_y) and epoch == ref_epoch
        for (x, y, epoch), (ref_x, ref_y, ref_epoch) in zip(arrived, expected)
    )


def test_no_pinned_memory_without_cuda(monkeypatch):
    """An Apple GPU has none. The tensors stay on the CPU here, since no such GPU is at hand."""
    moved, to = [], torch.Tensor.to

    def stay(tensor, device, **options):
        moved.append((device.type, options))
        return to(tensor, "cpu")

    monkeypatch.setattr(torch.Tensor, "to", stay)
    assert arrives_as_packed(torch.device("mps"))
    assert ("mps", {"non_blocking": False}) in moved
