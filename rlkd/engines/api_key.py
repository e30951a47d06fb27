"""An API key between the environment and a request's header, and nowhere else."""

import os
from collections.abc import Generator

import httpx

from rlkd.core.errors import ConfigError


class ApiKey(httpx.Auth):
    """Puts the key into each request's header. It has no repr, and no other way out."""

    def __init__(self, key: str | None) -> None:
        self.__key = key

    @classmethod
    def of(cls, name: str, variable: str | None) -> "ApiKey":
        if variable is None:
            return cls(None)
        key = os.environ.get(variable, "").strip()
        if not key:
            raise ConfigError(
                "RLKD-C720",
                f"the environment variable {variable} is not set: it should hold the API key",
                where=f"{name}.endpoint.key_env",
                fix=f"export {variable}=… in the shell that starts rlkd; the key is written nowhere",
            )
        if not (key.isascii() and key.isprintable() and " " not in key):
            raise ConfigError(
                "RLKD-C721",
                f"the environment variable {variable} holds no API key: it has spaces or characters that no key has",
                where=f"{name}.endpoint.key_env",
                fix="set it to the key alone",
            )
        return cls(key)

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        if self.__key is not None:
            request.headers["Authorization"] = f"Bearer {self.__key}"
        yield request

    def without(self, text: str) -> str:
        return text if self.__key is None else text.replace(self.__key, "<key>")
