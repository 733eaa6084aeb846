"""The metric log, who reads it, and the followers that feed trackers from it."""

from __future__ import annotations

from dovetail.run.tracking.log import LOG_NAME, MetricLog
from dovetail.run.tracking.reading import parse_record, read_metrics, read_records

__all__ = ["LOG_NAME", "MetricLog", "parse_record", "read_metrics", "read_records"]
