"""Offline measurements of a model, kept as files."""

from reasonalloc.calibration.ablation import ablation
from reasonalloc.calibration.attention_mass import attention_mass
from reasonalloc.calibration.calibrate import calibrate
from reasonalloc.calibration.fisher import fisher
from reasonalloc.calibration.joint import joint_costs
from reasonalloc.calibration.statistics import statistics

__all__ = ["ablation", "attention_mass", "calibrate", "fisher", "joint_costs", "statistics"]
