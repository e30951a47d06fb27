"""What is impossible or contradicts itself about teachers. Whether their vocabulary fits is for rlkd/teachers.py."""

import re
from collections.abc import Iterator
from urllib.parse import urlsplit

from rlkd.config.finding import Finding, Given
from rlkd.config.schema import EndpointConfig, TeacherConfig
from rlkd.core.types import Signal

VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def teachers(given: Given) -> Iterator[Finding]:
    config = given.config
    needs, name = config.algorithm.needs, config.algorithm.name
    scored = needs & {Signal.TEACHER, Signal.TEACHER_TOPK}
    if needs & {Signal.TEACHER, Signal.TEACHER_TOPK, Signal.TEACHER_TEXT} and not config.teachers:
        fix = "add `teachers: {NAME: {path: …}}`"
        fix += "" if scored else ", or `teachers: {NAME: {endpoint: {url: …, model: …}}}`"
        yield Finding(
            ("algorithm.name", "teachers"), f"the algorithm {name} asks for a teacher, and there is none", fix
        )
    yield from _named(given)
    for teacher, settings in config.teachers.items():
        at, endpoint = f"teachers.{teacher}", settings.endpoint
        yield from _unavailable(at, settings, bool(scored), name)
        if endpoint is None:
            continue
        if scored:
            what = f"{at} is an endpoint: it writes text, and the algorithm {name} needs log-probs of its teachers"
            fix = "give a local model (path), or take a method that uses a teacher's text: ampo, luffy, thinktuning"
            yield Finding((f"{at}.endpoint", "algorithm.name"), what, fix)
        if settings.path is not None:
            what = f"{at} has a path and an endpoint: it is one or the other"
            yield Finding((f"{at}.endpoint", f"{at}.path"), what, "leave one of them out")
        yield from _endpoint(f"{at}.endpoint", endpoint, settings)


def _named(given: Given) -> Iterator[Finding]:
    """The teachers that the algorithm calls by name are there; where it takes one and names none, there is only one."""
    algorithm, there = given.config.algorithm, given.config.teachers
    if not there:
        return
    known = ", ".join(there)
    for name in sorted(getattr(algorithm, "teacher_names", ())):
        if name not in there:
            what = f"the algorithm {algorithm.name} names the teacher {name!r}, and there is none"
            yield Finding(("algorithm.teacher", "algorithm.domains", "algorithm"), what, f"teachers are: {known}")
    alone = getattr(algorithm, "combine", None) == "one" and algorithm.teacher is None
    if alone and len(there) > 1 and algorithm.needs & {Signal.TEACHER, Signal.TEACHER_TOPK}:
        what = f"algorithm.combine=one, and there are {len(there)} teachers ({known})"
        fix = f"algorithm.teacher={next(iter(there))}, or combine=mean, confidence or domain"
        yield Finding(("algorithm.combine", "algorithm.teacher", "teachers"), what, fix)


def _unavailable(at: str, settings: TeacherConfig, scored: bool, algorithm: str) -> Iterator[Finding]:
    chosen, key = settings.on_unavailable, f"{at}.on_unavailable"
    if settings.endpoint is not None and chosen != "wait":
        what = (
            f"{key}={chosen} is of a local teacher: an endpoint is asked again as its `retries` say, then the run ends"
        )
        yield Finding((key, f"{at}.endpoint"), what, f"leave it out, and see {at}.endpoint.retries")
    elif chosen == "skip_kd" and not scored:
        what = f"{key}=skip_kd is of log-probs, and the algorithm {algorithm} asks {at} for none"
        yield Finding((key, "algorithm.name"), what, "wait or fail")


def _endpoint(at: str, endpoint: EndpointConfig, teacher: TeacherConfig) -> Iterator[Finding]:
    for key in ("url", "model"):
        if not getattr(endpoint, key):
            yield Finding((f"{at}.{key}", at), f"{at}.{key} is missing", f"give {at}.{key}", "RLKD-C004")
    if endpoint.url and (wrong := _wrong_url(endpoint.url)):
        yield Finding((f"{at}.url",), f"{at}.url {wrong}", "for example http://127.0.0.1:8000/v1")
    if endpoint.key_env is not None and not VARIABLE.fullmatch(endpoint.key_env):
        what = f"{at}.key_env is not the name of an environment variable"  # and may be the key: it is not shown
        yield Finding((f"{at}.key_env",), what, "export MY_KEY=… in the shell, and write key_env: MY_KEY")
    if endpoint.max_cost is not None and endpoint.price_in is None and endpoint.price_out is None:
        what = f"{at}.max_cost={endpoint.max_cost:g} is never reached without prices"
        yield Finding((f"{at}.max_cost", f"{at}.price_in"), what, f"give {at}.price_in and {at}.price_out")
    most, text = endpoint.max_total_tokens, teacher.writer.max_tokens
    if most is not None and most <= text:
        key = f"{at.removesuffix('.endpoint')}.writer.max_tokens"
        what = f"{at}.max_total_tokens={most} is not enough for one text of {key}={text}"
        yield Finding((f"{at}.max_total_tokens", key), what, f"more than {text}, for all texts of the run")
    if teacher.writer.context is not None:
        key = f"{at.removesuffix('.endpoint')}.writer.context"
        yield Finding((key, at), f"{key} is of a local teacher: an endpoint knows its own", "leave it out")


def _wrong_url(url: str) -> str | None:
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        return f"is no address: {error}"
    if parts.scheme not in ("http", "https") or not host:
        return "must begin with http:// or https:// and name a host"
    if parts.username or parts.password or parts.query or parts.fragment:
        return "must hold no user, password or query: a key comes from the environment (key_env)"
    return None
