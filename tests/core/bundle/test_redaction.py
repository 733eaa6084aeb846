from __future__ import annotations

from pathlib import Path

import pytest

from dovetail.bundle.redaction import is_absolute, plain_values, without_folders


@pytest.mark.parametrize("text", ["/a/b", "C:\\x", "\\\\host\\share\\x", "~/x", "~"])
def test_is_absolute_knows_paths_of_every_system(text):
    assert is_absolute(text)


@pytest.mark.parametrize("text", ["a/b", "digits:build", "1/2", "", "../x", "http://x/y"])
def test_is_absolute_leaves_other_text_alone(text):
    assert not is_absolute(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('File "/home/me/code/model.py", line 3', 'File "model.py", line 3'),
        ("C:\\Users\\me\\x.py failed", "x.py failed"),
        (
            "see https://pytorch.org/docs/stable/x.html",
            "see https://pytorch.org/docs/stable/x.html",
        ),
        ("case<i>/inputs/<name>", "case<i>/inputs/<name>"),
        ("(/a/b.py) [/c/d.py] x=/e/f.py, `/g/h.py`", "(b.py) [d.py] x=f.py, `h.py`"),
        ("run/config.toml and 3/4", "run/config.toml and 3/4"),
        ("torch/fx/experimental/x.py", "torch/fx/experimental/x.py"),
    ],
)
def test_without_folders_cuts_absolute_paths(text, expected):
    assert without_folders(text) == expected


def test_plain_values_are_json_and_name_no_folder():
    found = plain_values({"a": (1, 2.5, None, True), "b": Path("/x/y.bin"), "c": {"d": "/z/w/"}})
    assert found == {"a": [1, 2.5, None, True], "b": "y.bin", "c": {"d": "w"}}
