"""Which prompt comes next."""

from rlkd.curriculum.difficulty import Band, Difficulty
from rlkd.curriculum.uniform import Uniform

__all__ = ["Band", "Difficulty", "Uniform"]
