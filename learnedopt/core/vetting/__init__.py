"""The loop is vetted before its first estimate: is what it differentiates a function, and differentiated right?"""

from learnedopt.core.vetting.findings import Finding, report
from learnedopt.core.vetting.questions import examine, vet

__all__ = ["Finding", "examine", "report", "vet"]
