"""`rlkd` with prompts' seeds from a generator that no checkpoint knows: randomness that is not restored."""

import random

from rlkd.cli import main
from rlkd.curriculum import uniform

generator = random.Random(0)
uniform.occurrence_seed = lambda *_: generator.getrandbits(63)

if __name__ == "__main__":
    main()
