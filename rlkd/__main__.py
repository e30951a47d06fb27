"""`python -m rlkd` is `rlkd`."""

from rlkd.cli import main

main()
