"""Tables of launches: what they may say, and that decode attention is launched as they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from quire.kernels import launch_tables
from quire.kernels.launch_tables import Entry, Table
from quire.kernels.paged_decode.parameters import DecodeParameters, decode_parameters
from quire.kernels.paged_prefill.parameters import prefill_parameters
from quire.kernels.targets import A100, H100

LAUNCH = {"block_n": 128, "num_warps": 8, "num_stages": 4, "resident_programs": 1}
CASE = "bfloat16, head 128, pages int8"


@pytest.fixture
def table_of_h100(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of tables with one for an H100."""
    monkeypatch.setattr(launch_tables, "path_of", lambda target: tmp_path / f"{target.vendor}_{target.arch}.json")
    launch_tables._table.cache_clear()
    path = tmp_path / "cuda_90.json"
    launch_tables.write(path, Table({"device": "none"}, {"paged_decode": {CASE: Entry(LAUNCH, 80.0, 100.0)}}))
    yield path
    launch_tables._table.cache_clear()


def decode_on(target: Any, pages: torch.dtype | None) -> DecodeParameters:
    return decode_parameters(torch.bfloat16, 128, 32, 8, 64, 4096, None, target, pages)


def test_a_case_that_was_measured_is_launched_so(table_of_h100: Path) -> None:
    found = decode_on(H100, torch.int8)
    assert (found.block_n, found.num_warps, found.num_stages) == (128, 8, 4)
    assert found.num_shares == 132 // 8, "one program for each multiprocessor"
    assert found.max_registers == 255, "bounded by a thread's own, as one program may have them all"


def test_other_cases_and_targets_go_by_the_rules(table_of_h100: Path) -> None:
    reasoned = decode_on(H100, None)
    assert (reasoned.block_n, reasoned.num_warps) == (64, 4)
    assert decode_on(A100, torch.int8).block_n == decode_on(A100, None).block_n
    assert launch_tables.measured("paged_prefill", CASE, H100) == {}


def test_a_ring_has_a_slot_for_keys_and_one_for_values(table_of_h100: Path) -> None:
    entries = {"gluon_prefill": {CASE: Entry({"block_n": 128, "num_slots": 1}, 80.0, 100.0)}}
    launch_tables.write(table_of_h100, Table({}, entries))
    with pytest.raises(ValueError, match="num_slots of gluon_prefill cannot be 1"):
        launch_tables.read(table_of_h100)


def test_prefill_is_launched_as_measured_unless_it_is_short(table_of_h100: Path) -> None:
    launch = {"block_m": 64, "block_n": 32, "num_warps": 4, "num_stages": 3}
    entries = {"paged_prefill": {"bfloat16, head 128, pages bfloat16": Entry(launch, 80.0, 100.0)}}
    launch_tables.write(table_of_h100, Table({}, entries))
    launch_tables._table.cache_clear()
    found = prefill_parameters(torch.bfloat16, 128, 4, 512, H100)
    assert (found.block_m, found.block_n, found.num_warps, found.num_stages) == (64, 32, 4, 3)
    assert prefill_parameters(torch.bfloat16, 128, 4, 8, H100).block_n == 64
    assert prefill_parameters(torch.bfloat16, 128, 4, 512, H100, torch.int8).block_m == 128


def test_what_is_written_is_read(table_of_h100: Path) -> None:
    table = launch_tables.read(table_of_h100)
    assert table.facts == {"device": "none"}
    assert table.entries["paged_decode"][CASE] == Entry(LAUNCH, 80.0, 100.0)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"block_n": 96}, "block_n of paged_decode cannot be 96"),
        ({"block_n": 0}, "cannot be 0"),
        ({"num_warps": True}, "cannot be True"),
        ({"num_stages": 9}, "cannot be 9"),
        ({"block_m": 64}, "is launched with"),
    ],
)
def test_launches_that_cannot_be(table_of_h100: Path, change: dict[str, Any], complaint: str) -> None:
    written = json.loads(table_of_h100.read_text())
    written["entries"]["paged_decode"][CASE]["launch"] |= change
    table_of_h100.write_text(json.dumps(written))
    with pytest.raises(ValueError, match=complaint):
        launch_tables.read(table_of_h100)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"facts": {}, "entries": {"unknown": {"a": {"launch": {}}}}}'])
def test_files_that_are_no_table(tmp_path: Path, text: str) -> None:
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="is no table of launches"):
        launch_tables.read(path)


def test_the_tables_of_the_repository_can_be_read() -> None:
    for path in Path(launch_tables.__file__).parent.glob("*.json"):
        assert launch_tables.read(path).facts["device"]
