"""Any environment and ``additional_config`` give settings, or one readable error."""

from __future__ import annotations

from typing import Any

from fuzz_inputs import assert_readable, examples, misspelt, numbers, scalars, texts, values
from hypothesis import given
from hypothesis import strategies as st

from minference_vllm.settings import RENAMED, Settings, SettingsError, load_settings

FIELDS = list(Settings.model_fields)
VARIABLES = [f"MINFERENCE_{name.upper()}" for name in (*FIELDS, *RENAMED)]
WORDS = ["auto", "native", "dense", "low_rank(32, 0.95)", "", "0", "1", "0.5", " 1", "1_000", "nan", "inf"]
in_words = st.one_of(st.sampled_from(WORDS), numbers.map(str), texts)
environments = st.dictionaries(st.one_of(st.sampled_from(VARIABLES), misspelt(VARIABLES), texts), in_words, max_size=4)
own = st.dictionaries(
    st.one_of(st.sampled_from(FIELDS), misspelt([*FIELDS, *RENAMED]), texts, st.integers()),
    st.one_of(st.sampled_from(WORDS), scalars, values),
    max_size=4,
)
configurations = st.one_of(
    st.fixed_dictionaries({"minference": own}),
    st.fixed_dictionaries({"minference": own}, optional={"other": values}),
    st.dictionaries(st.one_of(misspelt(["minference"]), st.sampled_from(FIELDS), texts), values, max_size=3),
    values,
)


@examples(300)
@given(additional_config=configurations, environment=environments)
def test_settings_or_one_error(additional_config: Any, environment: dict[str, str]) -> None:
    try:
        settings = load_settings(additional_config, environment)
    except SettingsError as error:
        problems = len(environment) + (len(additional_config) if isinstance(additional_config, dict) else 0) + 4
        assert_readable(str(error), problems)
        return
    configured = additional_config.get("minference", {}) if isinstance(additional_config, dict) else {}
    assert set(configured) <= set(FIELDS)
    for field in FIELDS:
        variable = f"MINFERENCE_{field.upper()}"
        if field in configured:
            alone = load_settings({"minference": {field: configured[field]}}, {})
        elif environment.get(variable):
            alone = load_settings(None, {variable: environment[variable]})
        else:
            alone = Settings()
        assert getattr(settings, field) == getattr(alone, field), field


@examples(200)
@given(own)
def test_settings_come_back_from_what_they_say(own: dict[str, Any]) -> None:
    try:
        settings = load_settings({"minference": own}, {})
    except SettingsError:
        return
    assert load_settings({"minference": settings.model_dump()}, {}) == settings
    as_variables = {
        f"MINFERENCE_{name.upper()}": str(value) for name, value in settings.model_dump(exclude_none=True).items()
    }
    if settings.patterns != "":
        assert load_settings(None, as_variables) == settings
