import numpy as np
import pytest

from lightning_megatron.data.sampler import PADDING, BatchRamp, GlobalBatchSampler
from lightning_megatron.errors import DataError


def global_batches(ranks: list[GlobalBatchSampler]) -> list[list[int]]:
    """Real samples of each global batch, sorted."""
    return [sorted(i for part in parts for i in part if i != PADDING) for parts in zip(*ranks, strict=True)]


def test_the_last_partial_batch_is_kept_and_padded() -> None:
    sampler = GlobalBatchSampler(2318, 48, first_shuffled_epoch=None)
    batches = list(sampler)
    assert len(sampler) == len(batches) == 49
    assert all(len(batch) == 48 for batch in batches)
    assert [i for batch in batches for i in batch if i != PADDING] == list(range(2318))
    assert batches[-1].count(PADDING) == 49 * 48 - 2318


def flat(sampler: GlobalBatchSampler) -> list[int]:
    return [index for batch in sampler for index in batch]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_share_a_global_batch_evenly(size: int) -> None:
    ranks = [GlobalBatchSampler(50, 16, rank, size, first_shuffled_epoch=None) for rank in range(size)]
    assert all(len(batch) == 16 // size for rank in ranks for batch in rank)
    assert global_batches(ranks) == [list(range(i, min(i + 16, 50))) for i in range(0, 50, 16)]


def test_ranks_that_do_not_divide_the_batch() -> None:
    with pytest.raises(
        DataError, match="48 samples cannot be shared by 5 data-parallel ranks: make it a multiple, such as 50"
    ):
        GlobalBatchSampler(100, 48, 0, 5)


@pytest.mark.parametrize(
    ("first_shuffled", "shuffled"), [(0, [True, True]), (1, [False, True]), (None, [False, False])]
)
def test_which_epochs_are_shuffled(first_shuffled: int | None, shuffled: list[bool]) -> None:
    sampler = GlobalBatchSampler(64, 8, first_shuffled_epoch=first_shuffled)
    for epoch, expected in enumerate(shuffled):
        sampler.set_epoch(epoch)
        order = flat(sampler)
        assert sorted(order) == list(range(64))
        assert (order != list(range(64))) == expected


def test_each_epoch_has_its_own_order() -> None:
    sampler = GlobalBatchSampler(64, 8)
    orders = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        orders.append(tuple(flat(sampler)))
    assert len(set(orders)) == 3


@pytest.mark.parametrize("before", [1, 2, 4])
@pytest.mark.parametrize("after", [1, 2, 4])
@pytest.mark.parametrize("epoch", [0, 3])
def test_resuming_at_another_data_parallel_size(before: int, after: int, epoch: int) -> None:
    def ranks(size: int) -> list[GlobalBatchSampler]:
        samplers = [GlobalBatchSampler(203, 20, rank, size) for rank in range(size)]
        for sampler in samplers:
            sampler.set_epoch(epoch)
        return samplers

    whole = global_batches(ranks(1))
    first = ranks(before)
    state = first[-1].state_after(4)
    second = ranks(after)
    for sampler in second:
        sampler.load_state_dict(state)
    assert global_batches(first)[:4] + global_batches(second) == whole
    assert state["consumed_samples"] == 80
    assert len(second[0]) == 11  # the epoch's length in steps does not change by resuming


def test_set_epoch_keeps_the_place_in_the_same_epoch_only() -> None:
    sampler = GlobalBatchSampler(100, 10)
    sampler.load_state_dict({"consumed_samples": 30, "epoch": 2})
    sampler.set_epoch(2)
    assert sampler.start == 30
    sampler.set_epoch(3)
    assert sampler.start == 0


def test_resuming_another_order_is_an_error() -> None:
    state = GlobalBatchSampler(100, 10, order_id="a").state_after(1)
    with pytest.raises(DataError, match="another order of samples"):
        GlobalBatchSampler(100, 10, order_id="b").load_state_dict(state)
    with pytest.raises(DataError, match="consumed 90 samples of an epoch, the data has 50"):
        GlobalBatchSampler(50, 10).load_state_dict({"consumed_samples": 90})


class TestRamp:
    @pytest.mark.parametrize(
        ("ramp", "sizes"),
        [
            (BatchRamp(8, 8, 90), {0: 8, 29: 8, 30: 16, 60: 24, 89: 24, 90: 32, 91: 32, 10**9: 32}),
            (BatchRamp(32, 4, 100), {0: 32, 50: 32}),
            (BatchRamp(16, 16, 0), {0: 32, 1: 32}),
        ],
    )
    def test_sizes(self, ramp: BatchRamp, sizes: dict[int, int]) -> None:
        assert {consumed: ramp.size_at(consumed, 32) for consumed in sizes} == sizes

    def test_batches_grow_and_cover_the_epoch(self) -> None:
        sampler = GlobalBatchSampler(100, 16, ramp=BatchRamp(4, 4, 40), first_shuffled_epoch=None)
        batches = list(sampler)
        assert len(sampler) == len(batches)
        assert [len(batch) for batch in batches] == [4, 4, 4, 4, 8, 8, 12, 16, 16, 16, 16]
        assert [i for batch in batches for i in batch if i != PADDING] == list(range(100))

    def test_resuming_inside_the_ramp(self) -> None:
        def sampler() -> GlobalBatchSampler:
            return GlobalBatchSampler(100, 16, ramp=BatchRamp(4, 4, 40))

        resumed = sampler()
        resumed.load_state_dict(sampler().state_after(5))
        assert list(resumed) == list(sampler())[5:]

    def test_state_counts_the_batches_of_the_epoch(self) -> None:
        sampler = GlobalBatchSampler(100, 16, ramp=BatchRamp(4, 4, 40))
        assert [sampler.state_after(count)["consumed_samples"] for count in range(8)] == [0, 4, 8, 12, 16, 24, 32, 44]
        for batches in (None, 5):
            sampler.seek(24, batches=batches)
            assert [sampler.consumed_after(count) for count in (0, 4, 5, 6, 7)] == [0, 16, 24, 32, 44]

    def test_a_ramp_that_misses_the_final_size(self) -> None:
        with pytest.raises(DataError, match="rampup_batch_size=4,5,100 does not lead to global_batch_size=16"):
            GlobalBatchSampler(100, 16, ramp=BatchRamp(4, 5, 100))


def test_permutation_depends_on_the_seed() -> None:
    assert not np.array_equal(flat(GlobalBatchSampler(64, 8, seed=1)), flat(GlobalBatchSampler(64, 8, seed=2)))
