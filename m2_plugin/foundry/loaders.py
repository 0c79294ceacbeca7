"""Build the `DataLoader` of this package's dataloaders, and refuse one without batches."""

from typing import Any

from torch.utils.data import DataLoader

__all__ = ["PAD_MULTIPLE", "build_loader"]

PAD_MULTIPLE = 8  # for rows of unequal length; tensor cores are fastest at multiples of 8


def build_loader(
    dataset: Any,
    *,
    num_samples: int,
    batch_size: int,
    drop_last: bool,
    num_workers: int,
    prefetch_factor: int | None,
    persistent_workers: bool,
    timeout: int,
    **kwargs: Any,
) -> DataLoader[Any]:
    """Build a `torch.utils.data.DataLoader` that gives at least one batch per epoch.

    If an epoch has no batch, Composer runs for ever, or saves an untrained model.

    Without workers, `prefetch_factor`, `persistent_workers` and `timeout` are ignored.

    Args:
        dataset: The dataset.
        num_samples: The samples of this rank in one epoch.
        batch_size: The samples of this rank in one batch.
        drop_last: Whether to leave out a last batch that is not full.
        **kwargs: Other arguments of `DataLoader`.

    Raises:
        ValueError: If an epoch has no batch.
    """
    if num_samples == 0:
        raise ValueError(
            "This rank has no samples and no batch: give more data, or use fewer ranks."
        )
    if drop_last and num_samples < batch_size:
        raise ValueError(
            f"drop_last: true leaves no batch: an epoch has {num_samples} samples per rank and a "
            f"batch has {batch_size}. Set drop_last to false or a smaller global_train_batch_size, "
            "use fewer ranks, or give more data."
        )
    has_workers = num_workers > 0
    return DataLoader(
        dataset,
        batch_size=batch_size,
        drop_last=drop_last,
        num_workers=num_workers,
        # torch refuses these three without workers.
        prefetch_factor=prefetch_factor if has_workers else None,
        persistent_workers=persistent_workers and has_workers,
        timeout=timeout if has_workers else 0,
        **kwargs,
    )
