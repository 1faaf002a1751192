"""The README's support table is what the catalogue says."""

from __future__ import annotations

from pathlib import Path

import pytest

from cuflash.cli.support import PROBES, table, write_between
from cuflash.errors import InvalidArgument
from cuflash.plan.families import FEATURES, needs

README = Path(__file__).parent.parent / "README.md"


def test_every_feature_has_a_probe_that_needs_it_alone():
    assert {feature: needs(problem) for feature, problem in PROBES.items()} == {f: [f] for f in FEATURES}


def test_the_readme_is_current():
    text = README.read_text(encoding="utf-8")
    between = text.partition("<!-- support-table:begin -->\n")[2].partition("<!-- support-table:end -->")[0]
    assert between == table(), "run `python -m cuflash support --write README.md`"


def test_the_table_names_dtypes_by_family():
    header, _, forward, *_ = table().splitlines()
    assert "`sm90` (sm_90a)" in header
    assert "`sm80` (sm_80 and newer)" in header
    assert "`simt` (sm_70 and newer)" in header
    assert forward == "| forward | fp16 bf16 | fp16 bf16 | fp16 bf16 fp32 fp64 | fp16 bf16 fp32 fp64 |"


def test_writing_replaces_only_what_is_between_the_markers(tmp_path):
    file = tmp_path / "page.md"
    file.write_text("before\n<!-- x:begin -->\nold\n<!-- x:end -->\nafter\n")
    write_between(file, "x", "new\n")
    assert file.read_text() == "before\n<!-- x:begin -->\nnew\n<!-- x:end -->\nafter\n"
    with pytest.raises(InvalidArgument, match="y:begin"):
        write_between(file, "y", "new\n")
