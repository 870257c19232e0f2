"""Can the robust accuracy be believed? Checks of the model and of the attack on it; see :mod:`robustlab.evaluation.reliability.report`."""

from robustlab.evaluation.reliability.report import Finding, Report, examine

__all__ = ["Finding", "Report", "examine"]
