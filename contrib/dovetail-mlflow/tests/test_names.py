from __future__ import annotations

import pytest

from dovetail_mlflow._names import MAX_VALUE, safe_name, short_value, without_password


@pytest.mark.parametrize("name", ["train/loss", "val/accuracy", "lr", "a b.c-d_1", "größe", "損失"])
def test_name_that_mlflow_takes_stays(name):
    from mlflow.utils.validation import _validate_metric_name

    assert safe_name(name) == name
    _validate_metric_name(name)


NAMES = [
    "loss@val",
    "loss#val",
    "a//b",
    "/a",
    "a/",
    "a/../b",
    "..",
    ".",
    "",
    "..a",
    "x" * 300,
    "a:b",
]
NAMES += ["x" * 190 + "/" + "y" * 50, "a\nb", "\ud800", "★"]


@pytest.mark.parametrize("name", NAMES)
def test_name_that_mlflow_refuses_is_changed_into_one_it_takes(name):
    from mlflow.utils.validation import _validate_metric_name, _validate_param

    safe = safe_name(name)
    _validate_metric_name(safe)
    _validate_param(safe, "value")
    assert safe == safe_name(name)


def test_names_stay_different():
    assert len({safe_name(name) for name in NAMES}) == len(NAMES)


def test_short_value_fits_and_says_that_it_was_cut():
    assert short_value([1, "a"]) == "[1, 'a']"
    assert short_value("x" * MAX_VALUE) == "x" * MAX_VALUE
    cut = short_value("x" * (MAX_VALUE + 1))
    assert (len(cut), cut[-1]) == (MAX_VALUE, "…")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("postgresql://me:secret@host/db", "postgresql://me:***@host/db"),
        ("see https://:secret@host:80/a", "see https://:***@host:80/a"),
        ("https://host:80/a", "https://host:80/a"),
        ("mail me:you@host", "mail me:you@host"),
        (3, 3),
    ],
)
def test_password_of_an_address_is_left_out(value, expected):
    assert without_password(value) == expected
