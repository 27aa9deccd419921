"""`adacache calibrate`: finds a codebook for a model and a sampler from a few full runs.

One run per prompt computes every step and keeps some tokens of the metric residual and of the stack's. A few
more runs that reuse in one part of the schedule only show how much the output suffers there. What any
codebook would have computed, and what its output would have been off by, is then simulated from them; the
best one is run for real on prompts that it was not chosen on. Minutes, and no gradient.
"""

from adacache.calibration.recording import Record, Recording
from adacache.calibration.runs import Outcome, Subject, even_schedule, probe, record, subject_of
from adacache.calibration.search import calibrate, choose, scale, write

__all__ = [
    "Outcome",
    "Record",
    "Recording",
    "Subject",
    "calibrate",
    "choose",
    "even_schedule",
    "probe",
    "record",
    "scale",
    "subject_of",
    "write",
]
