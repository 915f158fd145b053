"""vLLM's and sgl-kernel's ops as quantkit offers them: their signatures, and that both kinds compile."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from quantkit.aliases import ALIASES

from .peer_schemas import SGLANG, VLLM, WRITES

PEERS = {"vllm": VLLM, "sglang": SGLANG}


def signature(schema: Any, writes: set[str] | None = None) -> list[Any]:
    """Names, types, defaults, which are by keyword only, which are written to; and the types of results."""
    given = {a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write}
    written = given if writes is None else writes
    arguments = [
        (a.name, str(a.type), a.has_default_value(), a.default_value, a.kwarg_only, a.name in written)
        for a in schema.arguments
    ]
    return [*arguments, [str(r.type) for r in schema.returns]]


@pytest.mark.parametrize("peer", PEERS)
def test_signatures(peer: str) -> None:
    offered = {name for name, alias in ALIASES.items() if peer in alias.peer.split(", ")}
    assert offered == set(PEERS[peer])
    for name, text in PEERS[peer].items():
        ours, theirs = ALIASES[name].overload._schema, torch._C.parse_schema(text)
        assert ours.name == "quantkit::" + theirs.name == "quantkit::" + name.split(".")[0]
        assert signature(ours) == signature(theirs, WRITES.get(name)), name


def test_no_op_of_quantkit_is_hidden() -> None:
    """A name that quantkit has for itself is shared with arguments that cannot be taken for its own."""
    from quantkit.ops._library import REFERENCES

    shared = {name for name in ALIASES if name.split(".")[0] in REFERENCES}
    assert all("." in name for name in shared), "an alias replaces an op"


def test_every_alias_is_called_by_a_test() -> None:
    """Where each of them is asked about by opcheck."""
    called = "".join(path.read_text() for path in Path(__file__).parent.glob("test_aliases_*.py"))
    missing = [name for name in ALIASES if not re.search(rf"Q\.{name.split('.')[0]}\b", called)]
    assert not missing
