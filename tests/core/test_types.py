from __future__ import annotations

import pytest

from dovetail.types import AccumulationStats, Accumulator, Collator, Exporter, Tracker


@pytest.mark.parametrize(("norm", "shown"), [(None, "none yet"), (1.23456, "1.235")])
def test_accumulation_stats_read_as_a_sentence(norm: float | None, shown: str) -> None:
    stats = AccumulationStats(
        total_steps=9,
        optimizer_steps=2,
        current_accumulation=1,
        effective_batch_size=32,
        is_accumulating=True,
        last_grad_norm=norm,
    )
    text = str(stats)
    assert "2 optimizer steps from 9 micro-batches (1 in the open window)" in text
    assert text.endswith(f"effective batch size 32, gradient norm {shown}")


@pytest.mark.parametrize("protocol", [Collator, Accumulator, Tracker, Exporter])
def test_protocols_tell_a_part_from_any_other_object(protocol: type) -> None:
    assert not isinstance(object(), protocol)
