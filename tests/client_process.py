"""A resource server in a process of its own, that tests stop and kill. Each line it reads is a token; it says the code.

python -m tests.client_process '{"issuer": …, "audience": …, "token": …, "feed": {…}}'
"""

from __future__ import annotations

import json
import sys

from service.client import NatsFeed, SseFeed, SyncTokenValidator


def main() -> None:
    told = json.loads(sys.argv[1])
    feed = told.pop("feed")
    made = NatsFeed(**feed) if feed else SseFeed()
    with SyncTokenValidator(told.pop("issuer"), told.pop("audience"), feed=made, **told) as validator:
        print("ready", flush=True)
        for line in sys.stdin:
            print(validator.validate(line.strip()).code, flush=True)


if __name__ == "__main__":
    main()
