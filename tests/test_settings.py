"""Settings: every variable is read once, has one default, and a bad value says what is allowed."""

from __future__ import annotations

from pathlib import Path

import pytest

from serve.settings import RUNTIME_FOLDER, VARIABLES, BadSetting, from_env


def test_nothing_set_gives_the_defaults() -> None:
    settings = from_env({})
    assert settings.app_api_key is None
    assert settings.hf_model_id == "gpt-oss/gpt-oss-20b"
    assert (settings.host, settings.port, settings.quant_type) == ("0.0.0.0", 7860, "auto")


def test_values_are_cast_and_empty_ones_count_as_unset() -> None:
    settings = from_env(
        {
            "PORT": "8080",
            "MODEL_IDS": " a/b , /models/c.gguf,",
            "QUANT_TYPE": "BNB4",
            "HF_MODEL_ID": "",
            "KV_CACHE_GB": "1.5",
            "ALLOW_IMAGE_URLS": "on",
            "OPENXLAB_MODEL_SUBDIR": "sub/",
        }
    )
    assert settings.port == 8080
    assert settings.model_ids == ("a/b", "/models/c.gguf")
    assert settings.quant_type == "bnb4"
    assert settings.hf_model_id == "gpt-oss/gpt-oss-20b"
    assert settings.kv_cache_gb == 1.5
    assert settings.allow_image_urls is True
    assert settings.openxlab_model_subdir == "sub"


@pytest.mark.parametrize(
    ("variable", "value", "allowed"),
    [
        ("PORT", "0", "a whole number from 1 to 65535"),
        ("PORT", "-1", "a whole number"),
        ("PORT", "7860.5", "a whole number"),
        ("QUANT_TYPE", "int3", "one of auto | awq"),
        ("KEY_DISPLAY", "public", "one of auto | owner"),
        ("APP_API_KEY", "short", "at least 8 characters"),
        ("APP_API_KEY", "with a space inside", "without spaces"),
        ("HF_MODEL_ID", "no-owner", "owner/name"),
        ("OPENXLAB_MODEL_REPO_URL", "http://insecure/x.git", "https:// or ssh://"),
        ("OPENXLAB_MODEL_REPO_URL", "https://--upload-pack=x", "https:// or ssh://"),
        ("OPENXLAB_MODEL_SUBDIR", "../up", "a folder inside the repository"),
        ("KV_CACHE_GB", "nan", "a number from"),
        ("ALLOW_IMAGE_URLS", "maybe", "on or off"),
    ],
)
def test_a_bad_value_names_the_variable_the_value_and_what_is_allowed(
    variable: str, value: str, allowed: str
) -> None:
    with pytest.raises(BadSetting) as caught:
        from_env({variable: value})
    line = str(caught.value)
    assert "\n" not in line
    assert variable in line and allowed in line
    if variable == "APP_API_KEY":
        assert value not in line
    else:
        assert value in line


def test_credentials_in_a_bad_address_are_masked() -> None:
    with pytest.raises(BadSetting) as caught:
        from_env({"OPENXLAB_MODEL_REPO_URL": "http://me:hunter2@host/x.git"})
    assert "hunter2" not in str(caught.value)


def test_runtime_data_lives_in_its_own_folder_of_the_work_dir(tmp_path: Path) -> None:
    assert from_env({"WORK_DIR": str(tmp_path)}).runtime_dir == tmp_path / RUNTIME_FOLDER
    by_user = from_env({"XDG_DATA_HOME": str(tmp_path)}).work_dir
    assert by_user in (tmp_path / "gpt-oss-app", Path("/home/xlab-app-center"))


def test_every_variable_has_a_meaning() -> None:
    assert len({name for name, _, _ in VARIABLES}) == len(VARIABLES)
    assert all(name.isupper() and meaning for name, meaning, _ in VARIABLES)
