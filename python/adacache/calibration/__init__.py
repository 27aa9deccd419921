# SPDX-License-Identifier: Apache-2.0
"""`adacache calibrate`: finds planned paths (`planning`), or a codebook, for a model and a sampler.

A codebook is searched with few full runs.

One run per prompt computes every step and records some tokens of the metric residual and the stack residual.
A few more runs reuse steps in one segment of the schedule only and measure how sensitive the output is there.
The computed steps and the output error of any codebook are then simulated from these records. The best
codebook is run on held-out prompts. This takes minutes and no gradient.
"""

from adacache.calibration.adaptive import calibrate_adaptive
from adacache.calibration.clips import psnr
from adacache.calibration.planning import PathCalibration, calibrate_paths
from adacache.calibration.recording import Record, Recording
from adacache.calibration.runs import (
    Outcome,
    Subject,
    difference,
    even_schedule,
    probe,
    record,
    run,
    subject_of,
)
from adacache.calibration.search import calibrate, choose, scale, write

__all__ = [
    "Outcome",
    "PathCalibration",
    "Record",
    "Recording",
    "Subject",
    "calibrate",
    "calibrate_adaptive",
    "calibrate_paths",
    "choose",
    "difference",
    "even_schedule",
    "probe",
    "psnr",
    "record",
    "run",
    "scale",
    "subject_of",
    "write",
]
