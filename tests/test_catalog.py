"""The snapshot of installed models: quick, current, and never shared."""

from __future__ import annotations

import json
import os
import time
from typing import TYPE_CHECKING, Any

import llm
import pytest

from datasette_llm.access import catalog, llm_files
from datasette_llm.access.catalog import get_snapshot
from datasette_llm.errors import ModelNotFoundError

from .fakes import FakeModel, registered

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "_current", None)
    monkeypatch.setattr(llm_files, "_latest", None)


@pytest.fixture
def listings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often llm was asked for its list."""
    calls: list[int] = []
    real = llm.get_models_with_aliases

    def counted() -> Any:
        calls.append(1)
        return real()

    monkeypatch.setattr(llm, "get_models_with_aliases", counted)
    return calls


def settle(path: Path) -> None:
    """Make a file look as if it had been written a while ago."""
    past = time.time_ns() - 10 * llm_files.SETTLED_NS
    os.utime(path, ns=(past, past))


def test_llm_is_asked_once(listings: list[int], llm_user_path: Path) -> None:
    (llm_user_path / "aliases.json").write_text('{"mine": "gpt-4o"}')
    settle(llm_user_path / "aliases.json")
    settle(llm_user_path)
    for _ in range(10):
        assert get_snapshot().get("mine").model_id == "gpt-4o"
    assert listings == [1]


def test_plugins_that_come_and_go_are_noticed_at_once() -> None:
    assert get_snapshot().resolve("one") is None
    with registered(FakeModel(model_id="one")):
        assert get_snapshot().get("one").model_id == "one"
        assert get_snapshot().resolve("two") is None
    with registered(FakeModel(model_id="two")):
        assert get_snapshot().resolve("one") is None
        assert get_snapshot().get("two").model_id == "two"
    assert get_snapshot().resolve("two") is None


def test_the_same_plugin_put_back_with_other_models_is_noticed() -> None:
    models = [FakeModel(model_id="first")]

    class Plugin:
        @llm.hookimpl
        def register_models(self, register: Any) -> None:
            for model in models:
                register(model, model)

    plugin = Plugin()
    llm.plugins.pm.register(plugin)
    assert get_snapshot().resolve("first")
    llm.plugins.pm.unregister(plugin)
    models[0] = FakeModel(model_id="second")
    llm.plugins.pm.register(plugin)
    assert get_snapshot().resolve("first") is None
    assert get_snapshot().resolve("second")


def test_a_snapshot_is_at_most_a_minute_old(listings: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    get_snapshot()
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 59)
    get_snapshot()
    assert listings == [1]
    monkeypatch.setattr(time, "monotonic", lambda: now + 61)
    get_snapshot()
    assert listings == [1, 1]


def test_an_alias_is_noticed_when_made_changed_and_removed(llm_user_path: Path) -> None:
    assert get_snapshot().resolve("mine") is None
    for model_id in ("gpt-4o", "gpt-4.1", "gpt-4o"):  # the last two of the same size
        llm.set_alias("mine", model_id)
        assert get_snapshot().resolve("mine") == model_id
    llm.remove_alias("mine")
    assert get_snapshot().resolve("mine") is None
    (llm_user_path / "aliases.json").unlink()
    assert get_snapshot().resolve("gpt-4o") == "gpt-4o"


def test_a_settled_file_that_is_rewritten_in_place_is_noticed(llm_user_path: Path) -> None:
    path = llm_user_path / "aliases.json"
    path.write_text('{"mine": "gpt-4o"}')
    settle(path)
    settle(llm_user_path)
    assert get_snapshot().resolve("mine") == "gpt-4o"
    path.write_text('{"mine": "gpt-4.1"}')  # leaves the directory as it was
    assert get_snapshot().resolve("mine") == "gpt-4.1"


def test_a_change_within_one_step_of_the_file_systems_clock_is_noticed(
    llm_user_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = llm_user_path / "aliases.json"
    now = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: now)
    for model_id in ("gpt-4.1", "gpt-4-1", "gpt-4.1"):  # of the same size
        path.write_text(json.dumps({"mine": model_id}))
        os.utime(path, ns=(now, now))
        os.utime(llm_user_path, ns=(now, now))
        assert get_snapshot().resolve("mine") == (model_id if model_id == "gpt-4.1" else None)


def test_another_user_directory_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "aliases.json").write_text('{"elsewhere": "gpt-4o"}')
    assert get_snapshot().resolve("elsewhere") is None
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    assert get_snapshot().resolve("elsewhere") == "gpt-4o"


def test_extra_openai_models_are_found(llm_user_path: Path) -> None:
    assert get_snapshot().resolve("local") is None
    (llm_user_path / "extra-openai-models.yaml").write_text(
        "- model_id: local\n  model_name: x\n  api_base: http://localhost\n  api_key_name: my-server\n"
    )
    snapshot = get_snapshot()
    assert snapshot.get("local").needs_key == "my-server"
    assert "my-server" in snapshot.key_names


def test_a_file_that_breaks_while_running_keeps_the_models(
    llm_user_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert get_snapshot().resolve("4o") == "gpt-4o"
    (llm_user_path / "aliases.json").write_text("{not json")
    settle(llm_user_path / "aliases.json")
    assert get_snapshot().resolve("4o") == "gpt-4o"
    assert "Keeping the models known so far" in caplog.text
    (llm_user_path / "aliases.json").write_text(json.dumps({"mine": "gpt-4o"}))
    assert get_snapshot().resolve("mine") == "gpt-4o"


def test_a_file_that_was_broken_from_the_start_is_an_error(llm_user_path: Path) -> None:
    (llm_user_path / "aliases.json").write_text("{not json")
    with pytest.raises(json.JSONDecodeError):
        get_snapshot()


def test_agrees_with_llm_about_every_name() -> None:
    with registered(FakeModel(model_id="4o"), FakeModel(model_id="gpt-4"), FakeModel(model_id="gpt-4")):
        snapshot = get_snapshot()
        for name, model in llm.get_async_model_aliases().items():
            found = snapshot.get(name)
            assert (found.model_id, type(found)) == (model.model_id, type(model))
        assert len(set(snapshot.ids)) == len(snapshot.ids)


def test_nobody_shares_a_model() -> None:
    one, other = get_snapshot().get("gpt-4o"), get_snapshot().get("4o")
    one.key = "only mine"
    assert one is not other
    assert other.key is None
    assert get_snapshot().for_hooks["gpt-4o"].key is None
    assert vars(other) == vars(llm.get_async_model("gpt-4o"))


def test_a_class_with_its_own_way_of_copying_keeps_it() -> None:
    class Slotted:
        __slots__ = ("extra",)
        extra: str

    class WithSlots(FakeModel, Slotted):
        pass

    class WithCopy(FakeModel):
        def __copy__(self) -> WithCopy:
            twin = WithCopy(model_id=self.model_id)
            twin.prompts = ["copied"]
            return twin

    slotted = WithSlots(model_id="slotted")
    slotted.extra = "kept"
    with registered(slotted, WithCopy(model_id="own-copy")):
        copied = get_snapshot().get("slotted")
        assert isinstance(copied, WithSlots)
        assert copied.extra == "kept"
        own = get_snapshot().get("own-copy")
        assert isinstance(own, WithCopy)
        assert own.prompts == ["copied"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpt-4oo", "Unknown model: 'gpt-4oo'; did you mean gpt-4o or"),
        ("gpt-3.5-turbo-instruct", "is installed without an async version"),
        ("zzzzzz", "`llm models` lists what is installed"),
    ],
)
def test_an_unknown_name_is_explained(name: str, message: str) -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        get_snapshot().get(name)
    assert name in str(caught.value)
    assert message in str(caught.value)
    assert isinstance(caught.value, llm.UnknownModelError)


def test_no_models_at_all() -> None:
    assert "no async llm models are installed" in str(catalog.Snapshot([]).not_found("x"))
