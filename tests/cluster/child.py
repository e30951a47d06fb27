"""`rlkd` with the paced engine in the place of `hf`."""

from rlkd.cli import main
from rlkd.workers import rollout

rollout.ENGINES["hf"] = "tests.cluster.paced_engine:PacedEngine"

if __name__ == "__main__":
    main()
