"""Settings and presets: where they come from, which wins, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from fsu_ray.config import PRESETS, change_recipe, differences, make_recipe, parse_change, read_settings
from fsu_ray.errors import InvalidConfig
from fsu_ray.recipes import Recipe


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_valid_recipe(name):
    """Each preset builds, twice the same, and what it names has come through."""
    recipe = make_recipe(name)
    assert recipe == make_recipe(name)
    dumped = recipe.model_dump()
    for part, values in PRESETS[name].items():
        if isinstance(values, dict):
            assert {k: dumped[part][k] for k in values} == values
        else:
            assert dumped[part] == values
    assert Recipe.model_validate_json(recipe.canonical()) == recipe


def test_the_default_preset_changes_nothing():
    """`default` is the defaults, with their digest."""
    assert make_recipe("default") == Recipe()
    assert len({make_recipe(name).digest for name in PRESETS}) == len(PRESETS)


def test_an_unknown_preset_is_refused():
    """One line that names the presets there are."""
    with pytest.raises(InvalidConfig, match="default, digits") as caught:
        make_recipe("fast")
    assert "\n" not in str(caught.value)


def test_changes_are_laid_over_in_turn():
    """Later changes win, neighbours stay, and the preset itself is never changed."""
    before = repr(PRESETS)
    one, two = {"invert": {"steps": 7, "weights": {"bn": 1.5}}}, {"invert": {"steps": 8}, "form": "paper"}
    recipe = make_recipe("digits", [one, two])
    assert (recipe.invert.steps, recipe.invert.batch, recipe.form) == (8, 120, "paper")
    assert recipe.invert.weights.bn == 1.5
    assert recipe.invert.weights.entropy == Recipe().invert.weights.entropy
    assert repr(PRESETS) == before


def test_a_recipe_can_be_changed_as_a_preset_can():
    """The rest stays, nothing is a change of nothing, and what is wrong is named."""
    recipe = make_recipe("deep")
    changed = change_recipe(recipe, [{"invert": {"weights": {"bn": 1.5}}}, {"relearn": {"lr": 0.5}}])
    assert (changed.invert.weights.bn, changed.relearn.lr, changed.invert.steps) == (1.5, 0.5, 1000)
    assert change_recipe(recipe, []) == recipe
    with pytest.raises(InvalidConfig, match=r"^recipe: invert\.stepz: "):
        change_recipe(recipe, [{"invert": {"stepz": 3}}])


def test_what_is_not_as_in_a_recipe_is_named_by_its_keys():
    """Numbers are compared by value, lists whole."""
    table = {"form": "paper", "invert": {"steps": 400.0, "weights": {"bn": 3}, "betas": [0.5, 0.999]}}
    assert differences(Recipe(), table) == {"form": "paper", "invert.weights.bn": 3}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("steps=3", "steps"),
        ("invert.stepz=3", "invert.stepz"),
        ("invert.weights.x=3", "invert.weights.x"),
        ("invert.steps=0", "invert.steps"),
        ("invert.steps=many", "invert.steps"),
        ("invert.steps=2.5", "invert.steps"),
        ("invert.lr=NaN", "invert.lr"),
        ("invert.lr=Infinity", "invert.lr"),
        ("invert=5", "invert"),
        ("form=mine", "form"),
        ("filter.threshold=0.5", "filter"),
        ("filter.policy=manual", "filter"),
        ("gate.agreement_min=1.5", "gate.agreement_min"),
    ],
)
def test_a_wrong_key_or_value_is_named_in_one_line(text, says):
    """Unknown keys and values out of range are refused with their path."""
    with pytest.raises(InvalidConfig, match=f"^recipe: {says}: ") as caught:
        make_recipe("default", [parse_change(text)])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "change"),
    [
        ("invert.steps=100", {"invert": {"steps": 100}}),
        ("form=paper", {"form": "paper"}),
        ("form=", {"form": ""}),
        ("invert.weights.bn=0.5", {"invert": {"weights": {"bn": 0.5}}}),
        ("invert.betas=[0.5, 0.9]", {"invert": {"betas": [0.5, 0.9]}}),
        ("filter.threshold=null", {"filter": {"threshold": None}}),
        ('form="continual"', {"form": "continual"}),
        ("form=a=b", {"form": "a=b"}),
    ],
)
def test_set_takes_json_or_a_string(text, change):
    """KEY=VALUE becomes a nested dictionary."""
    assert parse_change(text) == change


@pytest.mark.parametrize("text", ["", "steps", "=3"])
def test_set_without_key_or_value_is_refused(text):
    """The message shows the form that is wanted."""
    with pytest.raises(InvalidConfig, match="KEY=VALUE"):
        parse_change(text)


def test_everything_lies_in_dot_fsu_by_default(home):
    """The ledger, the artifacts and the runs are below .fsu of the working folder, and nothing is written."""
    found = read_settings()
    root = home.resolve() / ".fsu"
    assert (found.home, found.runs) == (root, str(root / "runs"))
    assert found.ledger == f"sqlite:///{root / 'ledger.db'}"
    assert found.artifacts == str(root / "artifacts")
    assert found.recipe == {}
    assert list(home.iterdir()) == []
    assert read_settings(home) == found


def test_the_file_wins_over_the_defaults_and_the_environment_over_the_file(home, monkeypatch):
    """Each setting on its own, and relative places are those of the folder of the file."""
    (home / "fsu.toml").write_text(
        'home = "work"\nledger = "postgresql://one/x"\nartifacts = "s3://bucket/a"\n[recipe.invert]\nsteps = 9\n'
    )
    found = read_settings(home)
    assert (found.home, found.ledger, found.artifacts) == (home / "work", "postgresql://one/x", "s3://bucket/a")
    assert make_recipe("default", [found.recipe]).invert.steps == 9
    monkeypatch.setenv("FSU_LEDGER", "sqlite:///other.db")
    assert read_settings(home).ledger == "sqlite:///other.db"
    assert read_settings(home).artifacts == "s3://bucket/a"
    monkeypatch.setenv("FSU_ARTIFACTS", "things")
    monkeypatch.setenv("FSU_HOME", str(home / "elsewhere"))
    found = read_settings(home)
    assert found.artifacts == str(home / "things")
    assert (found.home, found.runs) == (home / "elsewhere", str(home / "elsewhere" / "runs"))


@pytest.mark.parametrize(
    ("artifacts", "runs"),
    [
        ("s3://bucket", "s3://bucket/runs"),
        ("s3://bucket/a/", "s3://bucket/a/runs"),
        ("s3://bucket/a?region=eu-west-1&scheme=http", "s3://bucket/a/runs?region=eu-west-1&scheme=http"),
        ("gs://bucket/a", "gs://bucket/a/runs"),
    ],
)
def test_checkpoints_lie_below_artifacts_that_are_in_a_bucket(home, monkeypatch, artifacts, runs):
    """Workers anywhere reach both; who says where they lie has the last word."""
    monkeypatch.setenv("FSU_ARTIFACTS", artifacts)
    assert read_settings(home).runs == runs
    (home / "fsu.toml").write_text('runs = "checkpoints"\n')
    assert read_settings(home).runs == str(home / "checkpoints")
    monkeypatch.setenv("FSU_RUNS", "gs://other/place")
    assert read_settings(home).runs == "gs://other/place"


def test_checkpoints_lie_at_home_where_artifacts_are_in_a_folder(home, monkeypatch):
    """A shared folder is no bucket, in either way of writing it."""
    for artifacts in ("file:///shared/artifacts", "/shared/artifacts"):
        monkeypatch.setenv("FSU_ARTIFACTS", artifacts)
        assert read_settings(home).runs == str(home.resolve() / ".fsu" / "runs")


def test_an_empty_variable_is_no_setting(home, monkeypatch):
    """FSU_HOME= counts as not set."""
    for name in ("FSU_HOME", "FSU_LEDGER", "FSU_ARTIFACTS"):
        monkeypatch.setenv(name, "")
    assert read_settings().home == home.resolve() / ".fsu"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("home = ", "does not parse"),
        ("home = 1\n", "home must be a string"),
        ("ledger = ['a']\n", "ledger must be a string"),
        ("homes = 'x'\n", "unknown key 'homes'"),
        ("[recipe.invert]\nsteps = 'x'\n", "invert.steps"),
        ("[recipe]\nspeed = 1\n", "speed"),
    ],
)
def test_a_broken_file_is_refused_in_one_line(home, text, says):
    """What does not parse, unknown keys, and a recipe that is none: InvalidConfig."""
    (home / "fsu.toml").write_text(text)
    with pytest.raises(InvalidConfig, match=says) as caught:
        read_settings()
    assert "\n" not in str(caught.value)


def test_a_file_of_other_bytes_is_refused(home):
    """Not UTF-8, or a folder of that name."""
    file = home / "fsu.toml"
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidConfig, match="does not parse"):
        read_settings()
    file.unlink()
    Path(file).mkdir()
    with pytest.raises(InvalidConfig, match="does not parse"):
        read_settings()


def test_a_recipe_that_is_no_table(home: Path) -> None:
    """`recipe = 5` is one line, not a traceback."""
    (home / "fsu.toml").write_text("recipe = 5")
    with pytest.raises(InvalidConfig, match="recipe must be a table"):
        read_settings()
