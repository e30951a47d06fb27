"""`rlkd submit|status|logs|stop`: runs as Ray Jobs, submitted again when the platform takes their machines away.

package.py    what travels with a job: the recipe, local inputs, own modules, rlkd itself where it is a source install
jobs.py       Ray's Jobs API, each call with a time limit; attempts NAME-1, NAME-2, …
preflight.py  what the cluster must be: versions, room, storage, files (probe.py is run there)
client.py     submit, follow, submit again on exit 75
follow.py     a job's log until its end, over hiccups of the dashboard
ending.py     how a job ended, and in words
control.py    status, logs, stop
entry.py      on the cluster: `rlkd train`, and a last line that says how it ended
"""
