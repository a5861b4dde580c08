"""Settings: where they come from, in which order, and what a wrong one says."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from minference_vllm.settings import Settings, SettingsError, load_settings


def configured(**values: Any) -> dict[str, Any]:
    return {"minference": values}


def test_defaults_need_nothing() -> None:
    assert load_settings(None, {}) == load_settings({}, {}) == load_settings({"other": 1}, {}) == Settings()


def test_additional_config_wins_over_the_environment_and_that_over_the_default() -> None:
    environment = {"MINFERENCE_MIN_CONTEXT": "111", "MINFERENCE_MIN_CHUNK": "222"}
    settings = load_settings(configured(min_context=333), environment)
    assert (settings.min_context, settings.min_chunk) == (333, 222)
    assert settings.tile == Settings().tile


def test_every_field_can_be_set_from_the_environment() -> None:
    environment = {
        "MINFERENCE_PATTERNS": "dense",
        "MINFERENCE_MIN_CONTEXT": "1",
        "MINFERENCE_MIN_CHUNK": "2",
        "MINFERENCE_TILE": "256",
        "MINFERENCE_KERNEL": "block_table",
        "MINFERENCE_AUDIT_ROWS": "7",
        "MINFERENCE_AUDIT_SHARE": "0.25",
        "MINFERENCE_RECALL_FLOOR": "0.75",
        "MINFERENCE_LOG_INTERVAL": "0.5",
    }
    settings = load_settings(None, environment)
    for variable, text in environment.items():
        assert str(getattr(settings, variable.removeprefix("MINFERENCE_").lower())) == text


def test_the_process_environment_is_the_default_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINFERENCE_MIN_CONTEXT", "4321")
    assert load_settings().min_context == 4321


def test_an_empty_variable_counts_as_unset() -> None:
    assert load_settings(None, {"MINFERENCE_MIN_CONTEXT": ""}) == Settings()


def test_an_unknown_field_lists_the_known_ones() -> None:
    with pytest.raises(SettingsError) as error:
        load_settings(configured(min_contxt=5), {})
    message = str(error.value)
    assert 'additional_config["minference"]["min_contxt"]' in message
    for field in Settings.model_fields:
        assert field in message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("min_context", -1),
        ("min_context", 1 << 40),
        ("min_context", "long"),
        ("min_context", None),
        ("min_context", 1.5),
        ("min_chunk", 0),
        ("min_chunk", -256),
        ("min_chunk", 1 << 40),
        ("tile", 0),
        ("tile", -128),
        ("tile", 1 << 20),
        ("kernel", "cuda"),
        ("kernel", ""),
        ("log_interval", -1),
        ("log_interval", "often"),
        ("log_interval", float("nan")),
        ("patterns", 5),
        ("patterns", ["dense"]),
        ("audit_rows", -1),
        ("audit_rows", 1025),
        ("audit_share", -0.1),
        ("audit_share", 1.5),
        ("recall_floor", 0.0),
        ("recall_floor", 1.0),
        ("recall_floor", "high"),
    ],
)
def test_a_bad_value_names_its_place_and_itself(field: str, value: Any) -> None:
    with pytest.raises(SettingsError) as error:
        load_settings(configured(**{field: value}), {})
    assert f'additional_config["minference"]["{field}"] = {value!r}' in str(error.value)


def test_a_bad_variable_is_named_as_a_variable() -> None:
    with pytest.raises(SettingsError, match="MINFERENCE_MIN_CHUNK = 'many'"):
        load_settings(None, {"MINFERENCE_MIN_CHUNK": "many"})


def test_several_problems_come_in_one_message() -> None:
    with pytest.raises(SettingsError) as error:
        load_settings(configured(min_context=-1, kernel="cuda", colour="red"), {})
    for word in ("min_context", "kernel", "block_table", "colour"):
        assert word in str(error.value)


def test_the_old_name_of_a_setting_is_refused_with_the_new_one() -> None:
    for value in ("block_table", "native", 5):
        with pytest.raises(SettingsError) as error:
            load_settings(configured(engine=value), {})
        assert 'additional_config["minference"]["engine"]: this setting is now named \'kernel\'' in str(error.value)
    with pytest.raises(SettingsError, match="MINFERENCE_ENGINE: this setting is now named 'kernel'"):
        load_settings(None, {"MINFERENCE_ENGINE": "block_table"})
    with pytest.raises(SettingsError, match="MINFERENCE_ENGINE: this setting is now named 'kernel'"):
        load_settings(configured(kernel="native"), {"MINFERENCE_ENGINE": "block_table"})
    assert load_settings(None, {"MINFERENCE_ENGINE": ""}) == Settings(), "unset, as every empty variable"


@pytest.mark.parametrize("value", [None, 5, "min_context=5", ["min_context"]])
def test_settings_must_be_an_object(value: Any) -> None:
    with pytest.raises(SettingsError, match="must be an object of settings"):
        load_settings({"minference": value}, {})


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Settings().min_context = 5


@pytest.mark.parametrize("values", [{"recall_floor": 0.9, "audit_rows": 0}, {"audit_rows": 0, "recall_floor": 0.9}])
def test_a_floor_without_an_audit_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=r'"recall_floor"\] = 0.9: .*needs audit_rows of at least 1'):
        load_settings(configured(**values), {})
    assert load_settings(configured(recall_floor=0.9, audit_rows=1), {}).recall_floor == 0.9


@pytest.mark.parametrize(
    ("variable", "meant"),
    [
        ("MINFERENCE_MINCONTEXT", "MINFERENCE_MIN_CONTEXT"),
        ("MINFERENCE_PATTERN", "MINFERENCE_PATTERNS"),
        ("minference_min_context", "MINFERENCE_MIN_CONTEXT"),
        ("MInference_Kernel", "MINFERENCE_KERNEL"),
        ("MINFERNCE_MIN_CHUNK", "MINFERENCE_MIN_CHUNK"),
        ("MINFERENCELOG_INTERVAL", "MINFERENCE_LOG_INTERVAL"),
    ],
)
def test_a_misspelt_variable_is_refused_with_the_right_one(variable: str, meant: str) -> None:
    with pytest.raises(SettingsError, match=f"{variable}: unknown variable; did you mean {meant}"):
        load_settings(None, {variable: "5"})
    assert load_settings(None, {variable: ""}) == Settings(), "unset"


def test_a_variable_like_none_of_ours_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    others = {
        "MINFERENCE_PORT": "tcp://10.0.0.1:80",
        "MINFERENCE_CPU": "1",
        "INFERENCE_KERNEL": "x",
        "XINFERENCE_HOME": "x",
    }
    with caplog.at_level("WARNING", logger="vllm.minference_vllm"):
        assert load_settings(None, others) == Settings()
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("MINFERENCE_PORT is no setting of minference; those are MINFERENCE_PATTERNS, ")


@pytest.mark.parametrize("key", ["MInference", "minference_vllm", "mininference", "Minference "])
def test_a_misspelt_key_of_the_additional_config_is_refused(key: str) -> None:
    with pytest.raises(SettingsError) as error:
        load_settings({key: {"min_context": 5}}, {})
    assert str(error.value) == f'minference settings: additional_config["{key}"]: unknown; did you mean "minference"?'


def test_a_setting_outside_of_our_key_is_refused() -> None:
    with pytest.raises(SettingsError, match=r'\["min_context"\]: settings of minference stand in .*\["minference"\]'):
        load_settings({"min_context": 5}, {})
    assert load_settings({"inference": {}, "refresh": True, 5: None}, {}) == Settings(), "other plugins'"


def test_an_unknown_setting_is_told_the_nearest_one() -> None:
    with pytest.raises(SettingsError, match=r"unknown setting; known ones are .*; did you mean 'min_context'\?"):
        load_settings(configured(mincontext=5), {})
    with pytest.raises(SettingsError, match=r"log_interval$"):
        load_settings(configured(colour="red"), {})


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("min_context", -1, "a whole number from 0 to 16777216"),
        ("tile", 1.5, "a whole number from 32 to 4096"),
        ("kernel", "cuda", "one of auto, block_table, fa4, native, triton"),
        ("audit_share", 2, "a number from 0 to 1"),
        ("recall_floor", 1, "a number between 0 and 1, both excluded"),
        ("log_interval", -1, "a number of at least 0"),
        (
            "patterns",
            {"default": {}},
            "the path of a pattern file, the name of a shipped one, or a pattern for all heads",
        ),
    ],
)
def test_a_bad_value_is_told_what_is_allowed(field: str, value: Any, allowed: str) -> None:
    with pytest.raises(SettingsError) as error:
        load_settings(configured(**{field: value}), {})
    assert f'["{field}"] = {value!r}: must be {allowed}' in str(error.value)


@pytest.mark.parametrize("field", ["min_context", "tile", "audit_share", "log_interval"])
def test_no_setting_is_true_or_false(field: str) -> None:
    with pytest.raises(SettingsError, match=f'"{field}"\\] = True: no setting is true or false'):
        load_settings(configured(**{field: True}), {})


@pytest.mark.parametrize("name", ["\ud800", "a\nb", "\x1b[31mred", 5], ids=ascii)
def test_names_that_are_no_names_are_refused_in_one_line(name: Any) -> None:
    """As JSON may hold them, or Python."""
    for refused in ({"minference": {name: 1}}, {"minference": {"min_context": -1, name: None}}):
        with pytest.raises(SettingsError, match=r'additional_config\["minference"\]\[".*"\]: unknown setting') as error:
            load_settings(refused, {})
        assert str(error.value).isprintable()


def test_a_misspelt_variable_is_shown_in_one_line() -> None:
    with pytest.raises(SettingsError, match=r"MINFERENCE\\n_KERNEL: unknown variable; did you mean MINFERENCE_KERNEL"):
        load_settings(None, {"MINFERENCE\n_KERNEL": "auto"})


def test_what_is_long_is_shortened() -> None:
    with pytest.raises(SettingsError) as error:
        load_settings(configured(**{"kernel": "k" * 10**6, "x" * 10**6: 1}), {})
    assert len(str(error.value)) < 700
