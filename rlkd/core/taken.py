"""Whether an error says that somebody else has the network port that was to be used."""

import errno
import re

_WORDS = re.compile(r"address (is )?already in use|EADDRINUSE|already occupied|failed to bind to", re.IGNORECASE)


def port_taken(error: BaseException) -> bool:
    """As the system, torch, ZeroMQ, gRPC and Ray say it; also where it is only the cause of another error."""
    seen: set[int] = set()
    at: BaseException | None = error
    while at is not None and id(at) not in seen:
        if (isinstance(at, OSError) and at.errno == errno.EADDRINUSE) or _WORDS.search(str(at)):
            return True
        seen.add(id(at))
        at = at.__cause__ or at.__context__
    return False
