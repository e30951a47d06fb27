"""From a prompt to a group of samples."""

from rlkd.rollout.demonstrated import Demonstrated
from rlkd.rollout.sampled import Sampled

__all__ = ["Demonstrated", "Sampled"]
