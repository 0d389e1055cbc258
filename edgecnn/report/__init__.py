"""One self-contained HTML page a run, made from its result.json and nothing else."""

from edgecnn.report.page import write_report

__all__ = ["write_report"]
