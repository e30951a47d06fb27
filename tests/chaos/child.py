"""`rlkd` with the fast engine in the place of `hf`."""

from rlkd.cli import main
from rlkd.workers import rollout

rollout.ENGINES["hf"] = "tests.chaos.fast_engine:FastEngine"

if __name__ == "__main__":
    main()
