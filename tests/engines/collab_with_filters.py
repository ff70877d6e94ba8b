"""A job of NVIDIA FLARE's with a filter at every place: ``python collab_with_filters.py FOLDER``.

The file named by SEEN gets a line for all that a filter is shown, and for every reply to a call.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from nvflare.apis.filter import Filter
from nvflare.collab import CollabRecipe, collab
from nvflare.collab.runtime.defs import SETUP_TASK_NAME, SYNC_TASK_NAME
from nvflare.recipe import SimEnv


def note(*what: str) -> None:
    with open(os.environ["SEEN"], "a", encoding="utf-8") as stream:
        stream.write(json.dumps(what) + "\n")


class Seen(Filter):  # type: ignore[misc]
    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def process(self, shareable: Any, fl_ctx: Any) -> Any:
        del fl_ctx
        note("filter", self.where, repr(dict(shareable)))
        return shareable


class Server:
    @collab.main  # type: ignore[untyped-decorator]
    def main(self) -> None:
        for client in collab.clients:
            note("reply", client.name, repr(client(timeout=60.0).answer(b"a payload")))


class Client:
    @collab.publish  # type: ignore[untyped-decorator]
    def answer(self, request: bytes) -> bytes:
        return b"answer to " + request


def main(folder: Path) -> None:
    recipe = CollabRecipe("filters", server=Server(), client=Client(), min_clients=2)
    # The names of Collab's own tasks, of the call, and what other jobs call theirs.
    tasks = [SYNC_TASK_NAME, SETUP_TASK_NAME, "answer", "train"]
    for place in ("client_input", "client_output", "server_input", "server_output"):
        getattr(recipe, f"add_{place}_filter")(Seen(place), tasks=tasks)
    recipe.execute(SimEnv(num_clients=2, workspace_root=str(folder)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
