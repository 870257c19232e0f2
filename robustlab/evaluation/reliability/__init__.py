"""Can the robust accuracy be believed? Checks of the model and of the attacks on it; ``report`` says which and why."""

from robustlab.evaluation.reliability.report import Finding, Report, examine

__all__ = ["Finding", "Report", "examine"]
