"""Every shape and type of rlkd is checked at run time in the tests."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from hypothesis import settings
from jaxtyping import install_import_hook

settings.register_profile("rlkd", parent=settings.default, deadline=None)  # how long an example takes says nothing
settings.load_profile("rlkd")

install_import_hook("rlkd", "beartype.beartype")
