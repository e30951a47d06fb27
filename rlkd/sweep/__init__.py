"""A recipe tried with many settings, on Ray Tune.

spec.py       one key's distribution: what may come out, and how it is written on a command line
space.py      the file of `--space`: read, and checked against the recipe before any trial starts
settings.py   how the sweep goes about it: search, scheduler, metric
trial.py      one trial: rlkd's own run in a thread of a Tune actor (follow.py), forked for PBT (rlkd/fork.py)
resources.py  the placement group of a trial
tuner.py      begin, or go on after a kill; table.py and page.py: what came out
"""
