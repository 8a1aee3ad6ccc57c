"""Tests of `utils.config.listing` and `main.py --list`: every key with default, limits and meaning."""

import pytest

import main
from models import LEARNERS, SCHEMAS
from tests.conftest import EXPS, ROOT, SWEEPS


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main.main(["--list", *arguments]) == 0
    return capsys.readouterr().out


def test_the_page_of_all_keys_is_that_of_the_code(capsys: pytest.CaptureFixture[str]) -> None:
    """To renew it: `python main.py --list keys --format markdown > docs/configs.md`."""
    page = printed(capsys, "keys", "--format", "markdown")
    assert (ROOT / "docs/configs.md").read_text(encoding="utf-8") == page
    assert all(f"| `{key}` |" in page for schema in SCHEMAS.values() for key in schema.model_fields)


@pytest.mark.parametrize("method", SCHEMAS)
def test_every_key_of_a_method_is_printed_once(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, "keys", "--method", method).splitlines()
    keys = [line.split(" ")[0] for line in lines if not line.startswith(" ") and " = " in line]
    assert sorted(keys) == sorted(SCHEMAS[method].model_fields)


def test_default_limits_and_meaning_of_a_key_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "keys", "--method", "sema")
    assert 'engine = "fast" ("fast", "reference")\n    "reference" stores no activations' in text


@pytest.mark.parametrize(
    ("what", "names"),
    [
        ("methods", list(LEARNERS)),
        ("datasets", ["cifar224", "domainnet"]),
        ("backbones", ["vit_base_patch16_224"]),
        ("configs", [path.relative_to(ROOT).as_posix() for path in [*EXPS, *SWEEPS]]),
    ],
)
def test_what_there_is_is_listed(what: str, names: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    rows = dict(line.split(maxsplit=1) for line in printed(capsys, what).splitlines())
    assert rows.keys() >= set(names) and all(rows[name].strip() for name in names)


def test_an_unknown_method_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["--list", "keys", "--method", "semma"]) == 2
    assert 'did you mean "sema"?' in capsys.readouterr().err
    for command in ((), ("--list", "keys")):
        assert main.main([*command, "--method", "nested_lora"]) == 2
        assert "did you mean sema with ffn_adapter_type=nested_lora?" in capsys.readouterr().err
