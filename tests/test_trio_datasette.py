"""A real Datasette under trio: its secrets, its database in hooks, prompts within prompts."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, cast

import llm
import pytest
import trio
from cryptography.fernet import Fernet
from datasette.app import Datasette

from datasette_llm import LLM, ModelNotFoundError
from datasette_llm.backends.datasette_side import call

from .fakes import FakeModel, registered
from .hooks import hooked, llm_models

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Iterator

pytestmark = pytest.mark.real_clock


@pytest.fixture
def anyio_backend() -> str:
    return "trio"


class KeyedModel(llm.AsyncKeyModel):
    """A model that needs a key, and answers with how the one it was given ends."""

    model_id = "keyed"
    needs_key = "keyed"

    async def execute(
        self,
        prompt: llm.Prompt,
        stream: bool,
        response: llm.AsyncResponse,
        conversation: llm.AsyncConversation | None,
        key: str | None,
    ) -> AsyncGenerator[str, None]:
        yield f"key ends with {(key or '')[-3:]}"


@pytest.fixture
def model() -> Iterator[FakeModel]:
    fake = FakeModel()
    with registered(fake):
        yield fake


async def started(**plugins: Any) -> Datasette:
    """A Datasette whose startup has run, with these plugin configurations."""
    config = {name.replace("_", "-"): settings for name, settings in plugins.items()}
    datasette = Datasette(config={"plugins": {"datasette-llm": {"default_model": "fake"}, **config}})
    await call(datasette.invoke_startup)
    return datasette


class TestSecrets:
    async def test_a_secret_in_the_database_is_the_key_of_the_prompt(self) -> None:
        encryption_key = Fernet.generate_key()
        with llm_models(cast("llm.AsyncModel", KeyedModel())):
            datasette = await started(
                datasette_secrets={"encryption-key": encryption_key.decode()},
                datasette_llm={"default_model": "keyed"},
            )
            model_object = llm.get_async_model("keyed")
            models = LLM(datasette)
            assert await models.get_key_for_model(model_object) is None
            assert not await models.model_has_key(model_object)
            await _store_secret(datasette, encryption_key, "KEYED_API_KEY", "sk-stored-xyz")
            assert await models.get_key_for_model(model_object, actor={"id": "ana"}) == "sk-stored-xyz"
            assert await models.model_has_key(model_object)
            response = await (await models.model(actor={"id": "ana"})).prompt("hello")
            assert await response.text() == "key ends with xyz"
            used_by = await call(
                datasette.get_internal_database().execute, "select last_used_by from datasette_secrets"
            )
            assert used_by.single_value() == "ana"

    async def test_a_secret_that_the_purpose_names(self) -> None:
        encryption_key = Fernet.generate_key()
        with llm_models(cast("llm.AsyncModel", KeyedModel())):
            datasette = await started(
                datasette_secrets={"encryption-key": encryption_key.decode()},
                datasette_llm={"purposes": {"extract": {"model": {"model": "keyed", "key": "EXTRACT_KEY"}}}},
            )
            await _store_secret(datasette, encryption_key, "EXTRACT_KEY", "sk-extract-abc")
            async with LLM(datasette).group(purpose="extract") as group:
                assert await (await group.prompt("hello")).text() == "key ends with abc"


async def _store_secret(datasette: Datasette, encryption_key: bytes, name: str, value: str) -> None:
    """Store a secret the way the page of datasette-secrets does."""
    await call(
        datasette.get_internal_database().execute_write,
        "insert into datasette_secrets (name, version, encrypted, encryption_key_name) values (?, 1, ?, ?)",
        [name, Fernet(encryption_key).encrypt(value.encode()), "default"],
    )


class TestAsyncHooks:
    async def test_default_model_and_filter_may_query_the_database(self) -> None:
        async def default_model(datasette: Datasette, purpose: str | None) -> str | None:
            if purpose != "from-database":
                return None
            answer = await datasette.get_internal_database().execute("select 'second'")
            choice: str = answer.single_value()
            return choice

        async def filter_models(datasette: Datasette, models: Any, actor: Any) -> Any:
            allowed = await datasette.get_internal_database().execute("select 'second'")
            return [model for model in models if model.model_id == allowed.single_value()]

        with registered(FakeModel(), FakeModel(model_id="second")):
            datasette = await started()
            with hooked(llm_default_model=default_model, llm_filter_models=filter_models):
                models = LLM(datasette)
                assert (await models.model(purpose="from-database")).model_id == "second"
                assert [model.model_id for model in await models.models()] == ["second"]
                with pytest.raises(ModelNotFoundError):
                    await models.model("fake")
                with pytest.raises(ModelNotFoundError):
                    async with models.group("fake"):
                        pytest.fail("not to be reached")

    async def test_group_exit_runs_once_and_may_write(self, model: FakeModel) -> None:
        async def group_exit(datasette: Datasette, group: Any) -> None:
            db = datasette.get_internal_database()
            await db.execute_write("create table if not exists exits (purpose text, prompts integer)")
            await db.execute_write("insert into exits values (?, ?)", [group.purpose, len(group._responses)])

        async def failing_block(models: LLM) -> None:
            async with models.group("fake", purpose="body") as group:
                await group.prompt("one")
                raise ValueError("from the body")

        datasette = await started()
        with hooked(llm_group_exit=group_exit):
            async with LLM(datasette).group("fake", purpose="normal") as group:
                await group.prompt("one")
            with pytest.raises(ValueError, match="from the body"):
                await failing_block(LLM(datasette))
            with trio.CancelScope() as scope:
                async with LLM(datasette).group("fake", purpose="cancelled") as group:
                    await group.prompt("one")
                    scope.cancel()
                    await trio.sleep_forever()
        rows = await call(datasette.get_internal_database().execute, "select * from exits")
        assert [tuple(row) for row in rows.rows] == [("normal", 1), ("body", 1), ("cancelled", 1)]

    async def test_a_hook_may_prompt_too(self, model: FakeModel) -> None:
        """A wrapper asks another model for permission, on the hosted loop."""
        answers: list[str] = []

        def prompt_context(datasette: Datasette, purpose: str | None) -> Any:
            if purpose == "permission":
                return None

            @asynccontextmanager
            async def wrapper(result: Any) -> AsyncIterator[None]:
                asking = await LLM(datasette).model("fake", purpose="permission")
                answers.append(await (await asking.prompt("may I?")).text())
                yield

            return wrapper

        datasette = await started()
        with hooked(llm_prompt_context=prompt_context):
            response = await (await LLM(datasette).model("fake")).prompt("the real one")
            assert await response.text() == "the real one"
        assert answers == ["may I?"]


def test_a_datasette_whose_startup_never_ran(model: FakeModel) -> None:
    async def main() -> str:
        datasette = Datasette(config={"plugins": {"datasette-llm": {"default_model": "fake"}}})
        response = await (await LLM(datasette).model()).prompt("hello")
        return await response.text()

    assert trio.run(main) == "hello"
