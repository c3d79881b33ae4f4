"""Which key a model is called with, and that it shows nowhere."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any

import llm
import pytest
from cryptography.fernet import Fernet
from datasette_secrets import get_secrets

from datasette_llm.access.keys import KeyNames, KeyRing, provider_secrets
from datasette_llm.backends import datasette_side
from datasette_llm.facade import LLM

from .fakes import FakeModel
from .hooks import datasette_with, llm_models

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator
    from pathlib import Path

    from datasette.app import Datasette


class Keyed(llm.AsyncKeyModel):
    """A model that answers with the key it was called with."""

    needs_key = "my-provider"
    key_env_var = "MY_PROVIDER_ENV"

    def __init__(self, model_id: str) -> None:
        self.model_id = model_id

    async def execute(
        self, prompt: Any, stream: bool, response: Any, conversation: Any, key: str | None
    ) -> AsyncGenerator[str, None]:
        yield str(key)


class OldKeyed(FakeModel):
    """A model of the older kind, which looks for its key itself."""

    needs_key = "my-provider"

    async def execute(
        self, prompt: Any, stream: bool, response: Any, conversation: Any = None
    ) -> AsyncGenerator[Any, None]:
        yield str(self.get_key())


@pytest.fixture(autouse=True)
def _models() -> Iterator[None]:
    with llm_models(Keyed("keyed"), Keyed("sibling"), OldKeyed(model_id="old"), FakeModel(model_id="free")):
        yield


CONFIG = {
    "default_model": {"model": "keyed", "key": "DEFAULT_KEY"},
    "purposes": {
        "p": {"model": {"model": "keyed", "key": "PURPOSE_KEY"}, "models": ["sibling"]},
        "q": {"models": [{"model": "keyed", "key": "LISTED_KEY"}]},
    },
}


async def key(config: Any, model: Any = "keyed", purpose: str | None = None) -> str | None:
    return await LLM(datasette_with(config)).get_key_for_model(model, purpose=purpose)


async def test_the_order_of_keys(monkeypatch: pytest.MonkeyPatch, llm_user_path: Path) -> None:
    """From the last resort to the first: each that is added wins over those before."""
    assert await key(CONFIG, purpose="p") is None
    monkeypatch.setenv("MY_PROVIDER_ENV", "from the environment")
    assert await key(CONFIG, purpose="p") == "from the environment"
    (llm_user_path / "keys.json").write_text(json.dumps({"my-provider": "from keys.json"}))
    assert await key(CONFIG, purpose="p") == "from keys.json"
    monkeypatch.setenv("DATASETTE_SECRETS_MY_PROVIDER_API_KEY", "from the provider's secret")
    assert await key(CONFIG, purpose="p") == "from the provider's secret"
    monkeypatch.setenv("DATASETTE_SECRETS_DEFAULT_KEY", "from default_model")
    assert await key(CONFIG, purpose="p") == "from default_model"
    assert await key(CONFIG, "sibling", purpose="p") == "from the provider's secret"
    monkeypatch.setenv("DATASETTE_SECRETS_PURPOSE_KEY", "from the purpose")
    assert await key(CONFIG, purpose="p") == "from the purpose"
    assert await key(CONFIG) == "from default_model"
    monkeypatch.setenv("DATASETTE_SECRETS_LISTED_KEY", "from the purpose's list")
    assert await key(CONFIG, purpose="q") == "from the purpose's list"
    assert await key({}, purpose="p") == "from the provider's secret"


async def test_a_group_looks_its_key_up_once_and_an_alias_is_still_one(
    monkeypatch: pytest.MonkeyPatch, llm_user_path: Path
) -> None:
    (llm_user_path / "keys.json").write_text(json.dumps({"my-provider": "sk-stored", "other": "sk-other"}))
    async with LLM(datasette_with({})).group("keyed") as model:
        reads: list[Any] = []
        load_keys: Any = llm.load_keys

        def counted() -> Any:
            reads.append(load_keys())
            return reads[-1]

        monkeypatch.setattr(llm, "load_keys", counted)
        answers = [await response.text() async for _, response in model.map(range(3))]
        assert answers == ["sk-stored"] * 3
        assert not reads
        assert await (await model.prompt("x", key="other")).text() == "sk-other"
        assert reads


async def test_where_a_key_comes_from_has_a_name(
    monkeypatch: pytest.MonkeyPatch, llm_user_path: Path
) -> None:
    async def name(model: str = "keyed") -> str | None:
        return (await LLM(datasette_with(CONFIG)).model(model, purpose="p"))._choice.key_name

    assert await name() is None
    monkeypatch.setenv("MY_PROVIDER_ENV", "from the environment")
    assert await name() == "environment variable MY_PROVIDER_ENV"
    (llm_user_path / "keys.json").write_text(json.dumps({"my-provider": "from keys.json"}))
    assert await name() == "llm keys.json"
    monkeypatch.setenv("DATASETTE_SECRETS_PURPOSE_KEY", "from the purpose")
    assert await name() == "environment variable DATASETTE_SECRETS_PURPOSE_KEY"
    assert "from the purpose" not in repr(
        await KeyRing(datasette_with(), None).find(Keyed("x"), ["PURPOSE_KEY"])
    )


async def test_a_model_is_given_as_object_id_or_alias(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATASETTE_SECRETS_MY_PROVIDER_API_KEY", "K")
    llm.set_alias("other-name", "keyed")
    llm_ = LLM(datasette_with())
    for model in ("keyed", "other-name", llm.get_async_model("keyed"), await llm_.model("keyed")):
        assert await llm_.get_key_for_model(model) == "K"
        assert await llm_.model_has_key(model)
    with pytest.raises(llm.UnknownModelError):
        await llm_.get_key_for_model("no such model")


async def test_has_key(monkeypatch: pytest.MonkeyPatch) -> None:
    llm_ = LLM(datasette_with(CONFIG))
    assert await llm_.model_has_key("free")
    assert await llm_.get_key_for_model("free") is None
    assert not await llm_.model_has_key("keyed")
    monkeypatch.setenv("DATASETTE_SECRETS_PURPOSE_KEY", "K")
    assert await llm_.model_has_key("keyed", purpose="p")
    assert not await llm_.model_has_key("sibling", purpose="p")
    assert not await llm_.model_has_key("keyed")


async def test_models_are_filtered_by_their_own_key(monkeypatch: pytest.MonkeyPatch) -> None:
    async def offered(purpose: str | None = None, **config: Any) -> list[str]:
        models = await LLM(datasette_with({**CONFIG, **config})).models(purpose=purpose)
        return [model.model_id for model in models if model.model_id in ("keyed", "sibling", "old", "free")]

    assert await offered() == ["free"]
    assert await offered("p") == []
    assert await offered("p", require_keys=False) == ["keyed", "sibling"]
    monkeypatch.setenv("DATASETTE_SECRETS_PURPOSE_KEY", "K")
    assert await offered("p") == ["keyed"]
    assert await offered() == ["free"]
    monkeypatch.setenv("DATASETTE_SECRETS_MY_PROVIDER_API_KEY", "K")
    assert await offered("p") == ["keyed", "sibling"]
    assert await offered() == ["keyed", "sibling", "old", "free"]


async def test_a_missing_key_does_not_refuse_an_explicit_model() -> None:
    """It may be given with each prompt."""
    model = await LLM(datasette_with()).model("keyed")
    assert model._key is None
    assert await (await model.prompt("hi", key="mine")).text() == "mine"


async def test_models_of_both_kinds_are_called_with_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATASETTE_SECRETS_MY_PROVIDER_API_KEY", "the key")
    llm_ = LLM(datasette_with())
    for model_id in ("keyed", "old"):
        model = await llm_.model(model_id)
        assert model._key == "the key"
        assert await (await model.prompt("hi")).text() == "the key"
        async with llm_.group(model_id) as grouped:
            assert await (await grouped.prompt("hi")).text() == "the key"
    assert llm.get_async_model("old").key is None


async def test_a_model_with_a_key_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATASETTE_SECRETS_MY_PROVIDER_API_KEY", "provider's")
    own = Keyed("own")
    own.key = "its own"
    with llm_models(own):
        assert await key({}, "own") == "its own"
        config = {"default_model": {"model": "own", "key": "CONFIGURED"}}
        assert await key(config, "own") == "its own"
        monkeypatch.setenv("DATASETTE_SECRETS_CONFIGURED", "configured")
        model = await LLM(datasette_with(config)).model("own")
        assert await (await model.prompt("hi")).text() == "configured"
        assert await (await model.prompt("hi", key="given")).text() == "given"
    assert own.key == "its own"


async def test_a_model_plugin_may_find_keys_its_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    class Finder(Keyed):
        def get_key(self, explicit_key: str | None = None) -> str | None:
            return explicit_key or "found"

    class Seeker(Keyed):
        def get_key(self, explicit_key: str | None = None) -> str | None:
            raise llm.NeedsKeyException("nothing found")

    with llm_models(Finder("finder"), Seeker("seeker")):
        assert await key({}, "finder") == "found"
        assert await key({}, "seeker") is None
        assert not await LLM(datasette_with()).model_has_key("seeker")


async def test_a_broken_keys_file_is_no_key(llm_user_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (llm_user_path / "keys.json").write_text('{"my-provider": "sk-broken"')
    assert await key({}) is None
    assert "keys.json could not be read" in caplog.text
    assert "sk-broken" not in caplog.text
    (llm_user_path / "keys.json").write_text("[]")
    assert await key({}) is None


@pytest.mark.parametrize(
    ("needs_key", "secret"),
    [
        ("openai", ("OPENAI_API_KEY",)),
        ("my-provider", ("MY-PROVIDER_API_KEY", "MY_PROVIDER_API_KEY")),
        ("a.b c", ("A.B C_API_KEY", "A_B_C_API_KEY")),
    ],
)
def test_the_secrets_of_a_provider(needs_key: str, secret: tuple[str, ...]) -> None:
    assert provider_secrets(needs_key) == secret


async def test_a_secret_of_the_environment_has_either_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATASETTE_SECRETS_MY_PROVIDER_API_KEY", "exported by a shell")
    assert await key({}) == "exported by a shell"
    monkeypatch.setenv("DATASETTE_SECRETS_MY-PROVIDER_API_KEY", "under the name that is registered")
    assert await key({}) == "under the name that is registered"


async def test_the_key_in_a_purposes_list_beats_the_one_of_its_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    both: Any = {
        "default_model": {"model": "keyed", "key": "DEFAULT_KEY"},
        "purposes": {
            "p": {
                "model": {"model": "keyed", "key": "PURPOSE_KEY"},
                "models": ["sibling", {"model": "keyed", "key": "LISTED_KEY"}],
            }
        },
    }
    monkeypatch.setenv("DATASETTE_SECRETS_PURPOSE_KEY", "beside model")
    assert await key(both, purpose="p") == "beside model"
    monkeypatch.setenv("DATASETTE_SECRETS_LISTED_KEY", "beside models")
    assert await key(both, purpose="p") == "beside models"
    assert LLM(datasette_with(both))._get_purpose_key_for_model("keyed", "p") == "LISTED_KEY"


# The encrypted database.

ENCRYPTION_KEY = Fernet.generate_key().decode()


async def with_stored(config: Any = None, **secrets: str) -> Datasette:
    """Return a started Datasette whose database holds these secrets."""
    datasette = datasette_with(config, {"encryption-key": ENCRYPTION_KEY})
    await datasette_side.call(datasette.invoke_startup)
    for name, value in secrets.items():
        await datasette_side.call(
            datasette.get_internal_database().execute_write,
            "insert into datasette_secrets (name, encrypted, encryption_key_name) values (?, ?, 'default')",
            (name, Fernet(ENCRYPTION_KEY).encrypt(value.encode())),
        )
    return datasette


async def rows(datasette: Datasette, sql: str) -> list[tuple[Any, ...]]:
    results = await datasette_side.call(datasette.get_internal_database().execute, sql)
    return [tuple(row) for row in results.rows]


@pytest.mark.real_clock
async def test_secrets_of_the_encrypted_database(monkeypatch: pytest.MonkeyPatch) -> None:
    datasette = await with_stored(CONFIG, PURPOSE_KEY="stored purpose", MY_PROVIDER_API_KEY="stored provider")
    llm_ = LLM(datasette)
    assert (await llm_.model("keyed", purpose="p", actor={"id": "root"}))._key == "stored purpose"
    assert (await llm_.model("keyed"))._key == "stored provider"
    assert await rows(datasette, "select last_used_by from datasette_secrets where name = 'PURPOSE_KEY'") == [
        ("root",)
    ]
    monkeypatch.setenv("DATASETTE_SECRETS_PURPOSE_KEY", "from the environment")
    assert (await llm_.model("keyed", purpose="p"))._key == "from the environment"
    both = await with_stored(None, **{"MY_PROVIDER_API_KEY": "other", "MY-PROVIDER_API_KEY": "as registered"})
    assert await LLM(both).get_key_for_model("keyed") == "as registered"


@pytest.mark.real_clock
async def test_looking_where_a_key_comes_from_uses_no_secret() -> None:
    datasette = await with_stored(CONFIG, PURPOSE_KEY="stored purpose")
    names = KeyNames(datasette)
    assert await names.source(Keyed("keyed"), ["PURPOSE_KEY"]) == "secret PURPOSE_KEY"
    assert await names.source(Keyed("keyed")) is None
    assert await names.source(FakeModel()) is None
    assert await rows(datasette, "select last_used_at from datasette_secrets") == [(None,)]
    assert await KeyNames(datasette_with(None, {"encryption-key": ENCRYPTION_KEY})).source(Keyed("x")) is None
    assert (await LLM(datasette).model("keyed", purpose="p"))._choice.key_name == "secret PURPOSE_KEY"


@pytest.mark.real_clock
async def test_each_secret_is_read_once_however_many_models_need_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasette_secrets

    datasette = await with_stored(None, OPENAI_API_KEY="stored")
    asked: list[str] = []
    real = datasette_secrets.get_secret

    async def counted(datasette: Any, name: str, actor_id: str | None = None) -> Any:
        asked.append(name)
        return await real(datasette, name, actor_id=actor_id)

    monkeypatch.setattr(datasette_secrets, "get_secret", counted)
    models = await LLM(datasette).models()
    assert {"gpt-4o", "gpt-4o-mini", "free"} <= {model.model_id for model in models}
    assert "keyed" not in {model.model_id for model in models}
    assert len(asked) == len(set(asked))


@pytest.mark.real_clock
async def test_a_secret_that_can_not_be_decrypted_is_logged_and_absent(
    caplog: pytest.LogCaptureFixture,
) -> None:
    datasette = await with_stored(None)
    await datasette_side.call(
        datasette.get_internal_database().execute_write,
        "insert into datasette_secrets (name, encrypted, encryption_key_name) values (?, ?, 'default')",
        ("MY_PROVIDER_API_KEY", Fernet(Fernet.generate_key()).encrypt(b"sk-other")),
    )
    assert await LLM(datasette).get_key_for_model("keyed") is None
    assert "The secret MY_PROVIDER_API_KEY could not be read: InvalidToken" in caplog.text


@pytest.mark.real_clock
async def test_without_startup_or_database_the_next_source_is_used(
    llm_user_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (llm_user_path / "keys.json").write_text(json.dumps({"my-provider": "from keys.json"}))
    never_started = datasette_with(None, {"encryption-key": ENCRYPTION_KEY})
    assert await LLM(never_started).get_key_for_model("keyed") == "from keys.json"
    missing = datasette_with(None, {"encryption-key": ENCRYPTION_KEY, "database": "nowhere"})
    assert await LLM(missing).get_key_for_model("keyed") == "from keys.json"
    assert "could not be read: KeyError" in caplog.text


@pytest.mark.real_clock
async def test_all_names_are_registered_with_datasette_secrets(llm_user_path: Path) -> None:
    (llm_user_path / "extra-openai-models.yaml").write_text(
        "- model_id: local\n  model_name: x\n  api_base: http://localhost\n  api_key_name: my-server\n"
    )
    registered = {s.name: s for s in await datasette_side.call(get_secrets, datasette_with(CONFIG))}
    assert {
        "OPENAI_API_KEY",
        "MY-PROVIDER_API_KEY",
        "MY-SERVER_API_KEY",
        "DEFAULT_KEY",
        "PURPOSE_KEY",
        "LISTED_KEY",
    } <= set(registered)
    assert "MY_PROVIDER_API_KEY" not in registered
    assert registered["PURPOSE_KEY"].description == "API key for keyed"
    wrong = {s.name for s in await datasette_side.call(get_secrets, datasette_with({"mdoels": 1}))}
    assert "OPENAI_API_KEY" in wrong


async def test_keys_show_nowhere(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("DATASETTE_SECRETS_MY_PROVIDER_API_KEY", "sk-hidden")
    llm_ = LLM(datasette_with({"blocked_models": ["sibling"]}))
    model = await llm_.model("keyed")
    response = await model.prompt("hi")
    assert await response.text() == "sk-hidden"
    shown = [repr(model), str(model), repr(model._choice), repr(llm_), repr(await llm_.models()), caplog.text]
    with pytest.raises(llm.UnknownModelError) as caught:
        await llm_.model("sibling")
    async with llm_.group("keyed") as grouped:
        shown += [repr(grouped), repr(grouped.group), repr(grouped.stats)]
    assert "sk-hidden" not in " ".join([*shown, str(caught.value)])
