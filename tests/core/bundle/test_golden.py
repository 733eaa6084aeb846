from __future__ import annotations

import numpy as np
import pytest

from dovetail.bundle.golden import GoldenCase, read_golden, write_golden
from dovetail.errors import BundleError


@pytest.fixture
def cases():
    return [
        GoldenCase(
            {"x": np.arange(n, dtype=np.uint8)}, {"logits": np.full((n, 2), 0.5, np.float32)}
        )
        for n in (1, 3)
    ]


def test_golden_cases_come_back_as_they_were_written(cases, tmp_path):
    write_golden(tmp_path / "golden.npz", cases)
    found = read_golden(tmp_path / "golden.npz")
    assert len(found) == 2
    assert found[1].inputs["x"].dtype == np.uint8
    assert found[1].outputs["logits"].tolist() == [[0.5, 0.5]] * 3


def test_golden_file_is_named_by_case_role_and_tensor(cases, tmp_path):
    write_golden(tmp_path / "golden.npz", cases)
    with np.load(tmp_path / "golden.npz") as archive:
        assert "case1/outputs/logits" in archive.files


def test_golden_file_has_the_same_bytes_for_the_same_cases(cases, tmp_path):
    write_golden(tmp_path / "a.npz", cases)
    write_golden(tmp_path / "b.npz", cases)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_read_golden_executes_no_pickle(tmp_path):
    np.savez(tmp_path / "golden.npz", **{"case0/inputs/x": np.array([{"an": "object"}])})
    with pytest.raises(BundleError, match=r"golden\.npz: cannot be read"):
        read_golden(tmp_path / "golden.npz")


def test_write_golden_writes_no_pickle(tmp_path):
    case = GoldenCase({"x": np.array([{"an": "object"}])}, {})
    with pytest.raises(ValueError, match=r"[Oo]bject arrays"):
        write_golden(tmp_path / "golden.npz", [case])


@pytest.mark.parametrize("key", ["x", "case0/weights/x", "caseA/inputs/x"])
def test_read_golden_refuses_other_members(key, tmp_path):
    np.savez(tmp_path / "golden.npz", **{key: np.zeros(1)})
    with pytest.raises(BundleError, match="expected arrays named case<i>"):
        read_golden(tmp_path / "golden.npz")


def test_read_golden_refuses_a_torn_file(cases, tmp_path):
    path = tmp_path / "golden.npz"
    write_golden(path, cases)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(BundleError, match="cannot be read"):
        read_golden(path)
