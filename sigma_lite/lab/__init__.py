"""The balance laboratory: experiments as arms x seeds x scale, run side by side, kept as small JSON files."""

from sigma_lite.lab.catalogue import EXPERIMENTS, experiment
from sigma_lite.lab.experiment import Arm, Experiment, Scale, Share
from sigma_lite.lab.results import read_results
from sigma_lite.lab.run import compare, run_experiment
from sigma_lite.lab.scales import SCALES, scale

__all__ = [
    "EXPERIMENTS",
    "SCALES",
    "Arm",
    "Experiment",
    "Scale",
    "Share",
    "compare",
    "experiment",
    "read_results",
    "run_experiment",
    "scale",
]
