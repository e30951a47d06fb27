"""Whether an algorithm that takes worked answers can get any."""

from collections.abc import Iterator

from rlkd.config.finding import Finding, Given


def demonstrations(given: Given) -> Iterator[Finding]:
    algorithm, source = given.config.algorithm, given.config.data.train
    if not getattr(algorithm, "demonstrated", False) or getattr(algorithm, "live", False):
        return
    written = source.kind == "arithmetic" and source.options.get("demonstrations")
    if source.demonstrations is None and source.traces is None and not written:
        what = f"the algorithm {algorithm.name} takes worked answers, and data.train has none"
        fix = "data.train.demonstrations=COLUMN or data.train.traces=FILE; or algorithm.live=true, with teachers"
        if source.kind == "arithmetic":
            fix = "data.train.options={demonstrations: 1}"
        yield Finding(("algorithm.name", "data.train"), what, fix)
