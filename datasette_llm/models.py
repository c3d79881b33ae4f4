"""The models that plugins hold: prompts, chains and conversations, alone or in a group."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from .calls.attachments import need_finding, with_types, without_files
from .calls.batches.offline import sample_request
from .pace.registry import get_throttle
from .secrecy import keep_secret
from .tasks.chain import Chain
from .tasks.chain_task import ChainTask
from .tasks.conversation import Turns
from .tasks.group_block import GroupBlock
from .tasks.group_supervisor import GroupSupervisor
from .tasks.map import MapRun, PromptMap
from .tasks.prompt_task import PromptTask
from .tasks.root import root_supervisor

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Mapping

    import llm

    from .calls.batches.offline import Offline, Request
    from .calls.choice import Choice
    from .calls.clients.pool import ClientPool
    from .calls.prices import Pricing
    from .calls.standing import Refusal
    from .pace.policy import Patience
    from .pace.slots import Slots
    from .responses.response import PromptResponse
    from .tasks.conversation import Turn
    from .tasks.stats import GroupStats
    from .tasks.supervisor import Supervisor

T = TypeVar("T")


class WrappedAsyncModel:
    """A model chosen for a purpose and an actor. ``LLM.model()`` returns it.

    Attributes:
        model_id: the model's own id.
        purpose: what its prompts are for.
        actor: the Datasette actor they are for.
        model: llm's model object underneath, a copy that nobody else holds.
    """

    def __init__(self, datasette: Any, choice: Choice, supervisor: GroupSupervisor | None = None) -> None:
        self.model_id = choice.model_id
        self.purpose = choice.purpose
        self.actor = choice.actor
        self.model = choice.model
        self._key = choice.key
        self._datasette = datasette
        self._choice = choice
        self._supervisor = supervisor
        self._clients: ClientPool | None = None

    async def prompt(self, prompt: str | None = None, **kwargs: Any) -> PromptResponse:
        """Start a prompt, and return its response at once.

        It returns when the plugins' wrappers have let the prompt in and its model call starts. The
        prompt goes on by itself, whether anybody reads it or not; ``response.cancel()`` stops it.
        Cancelling this call cancels the prompt.

        Args:
            prompt: the text to send.
            **kwargs: all that llm's ``AsyncModel.prompt()`` takes (``system``, ``schema``,
                ``attachments``, ``tools``, ``messages``, ``stream``, ``key``, ``options``, ...), and the
                model's options by name. Options given here win over configured ones.

        Returns:
            the response, readable by any number of tasks.

        Raises:
            Exception: what a plugin's wrapper raised to refuse the prompt, as it raised it.
            ValueError: an attachment is of a type that the model does not take, or its host does not give it.
            GroupClosed: this model belongs to a group whose block has been left.
            PromptCancelled: the prompt, or its group, was cancelled before its model call started.

        A failure of the model call itself is raised to whoever reads the response.
        """
        kwargs = await self._with_found_types(kwargs)
        return await self._prompt_task(self.model.prompt, prompt, kwargs).start()

    def chain(self, prompt: str | None = None, **kwargs: Any) -> Chain:
        """Prompt, run the tools that the model calls, prompt again with their results, until it is done.

        Args:
            prompt: the text to send; ``None`` to resume from ``messages=``.
            **kwargs: all that llm's ``AsyncModel.chain()`` takes (``tools``, ``before_call``,
                ``after_call``, ``messages``, ``system``, ``options``, ...), and ``chain_limit``.

        Returns:
            the chain, which starts when it is first read.
        """
        limit = kwargs.pop("chain_limit", None)

        def begin(prompt: str | None, **kwargs: Any) -> llm.models.AsyncChainResponse:
            return self.model.conversation(chain_limit=limit).chain(prompt, **kwargs)

        return self._chain(begin, prompt, kwargs)

    def conversation(
        self,
        tools: list[Any] | None = None,
        before_call: Any = None,
        after_call: Any = None,
        chain_limit: int | None = None,
    ) -> WrappedConversation:
        """Begin a conversation: prompts that each know the ones before."""
        return WrappedConversation(
            self,
            self.model.conversation(
                tools=tools, before_call=before_call, after_call=after_call, chain_limit=chain_limit
            ),
        )

    @property
    def default_options(self) -> Mapping[str, Any]:
        """What the configuration sets; options given to a prompt win."""
        return self._choice.options

    @property
    def pricing(self) -> Pricing | None:
        """What its tokens cost, as it is configured or listed; ``None`` if no price is known."""
        return self._choice.pricing

    def __getattr__(self, name: str) -> Any:
        # What llm's model says of itself: attachment_types, supports_schema, can_stream, ...
        if name.startswith("_") or name == "model":
            raise AttributeError(name)
        return getattr(self.model, name)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.model_id} purpose={self.purpose!r}>"

    def _owner(self) -> tuple[Supervisor, Slots]:
        if self._supervisor is not None:
            self._supervisor.check_open()
            return self._supervisor, self._supervisor.slots
        choice = self._choice
        root = root_supervisor()
        throttle = get_throttle(choice.key, choice.model_id, choice.settings, choice.key_name)
        slots = root.slots_of(
            throttle, choice.settings.concurrency, urgent=choice.settings.interactive is not False
        )
        if self._clients is not root.clients:
            # The first prompt on this event loop: clients of an earlier one are closed.
            root.clients.adopt(choice.model, throttle.observe)
            self._clients = root.clients
        return root, slots

    async def _with_found_types(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Find the types of attachments that are only an address, before llm does."""
        if not need_finding(kwargs):
            return kwargs
        supervisor, _ = self._owner()
        takes = getattr(self.model, "attachment_types", ())
        return await with_types(supervisor.clients_here, kwargs, takes)

    def _prompt_task(
        self,
        send: Callable[..., llm.AsyncResponse],
        prompt: str | None,
        kwargs: dict[str, Any],
        turn: Turn | None = None,
        *,
        keep: bool = True,
    ) -> PromptTask:
        supervisor, slots = self._owner()
        arguments = self._with_defaults(kwargs)
        task = PromptTask(
            supervisor,
            self._datasette,
            self._choice,
            lambda: send(prompt, **arguments),
            slots,
            prompt=prompt,
            turn=turn,
            reply_model=self,
        )
        if self._supervisor is not None:
            self._supervisor.group._responses.add(task.response, keep=keep)
        return task

    def _chain(
        self,
        begin: Callable[..., llm.models.AsyncChainResponse],
        prompt: str | None,
        kwargs: dict[str, Any],
        turns: Turns | None = None,
    ) -> Chain:
        arguments = self._with_defaults(kwargs)
        finding = need_finding(arguments)
        # Arguments that llm does not take are refused here and now, as llm does. Finding types takes time.
        begun = begin(prompt, **(without_files(arguments) if finding else arguments))

        async def begin_turn() -> llm.models.AsyncChainResponse:
            if finding:
                return begin(prompt, **await self._with_found_types(arguments))
            # The history of the conversation was not complete yet when the chain was made.
            return begun if turns is None else begin(prompt, **arguments)

        def task(chain: Chain) -> ChainTask:
            supervisor, slots = self._owner()
            return ChainTask(
                chain,
                supervisor,
                self._datasette,
                self._choice,
                begin_turn,
                slots,
                prompt=prompt,
                turn=turns.ask() if turns is not None else None,
                reply_model=self,
            )

        return Chain(begun, task)

    def _with_defaults(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Add to the arguments of a prompt what the choice says about it."""
        if not getattr(self._choice.model, "can_stream", True):
            # llm's command does not ask such a model to stream either.
            arguments["stream"] = False
        if self._choice.options:
            given = arguments.get("options") or {}
            defaults = {k: v for k, v in self._choice.options.items() if k not in arguments}
            arguments["options"] = {**defaults, **given}
        if arguments.get("key") is not None:
            keep_secret(arguments["key"])
        elif self._key is not None:
            arguments["key"] = self._key
        return arguments


class WrappedConversation:
    """A conversation as an actor: one prompt at a time, in the order they were asked, whoever asks.

    A prompt that fails or is cancelled is not part of the history, and the next one goes on. So is a
    chain, unless it paused or reached its limit: ``chain(None)`` then resumes it.

    Attributes:
        conversation: llm's conversation object; ``responses`` are the turns so far.
    """

    def __init__(self, model: WrappedAsyncModel, conversation: llm.AsyncConversation) -> None:
        self.conversation = conversation
        self.model = model
        self._turns = Turns(conversation)

    @property
    def id(self) -> str:
        """llm's id of the conversation."""
        return self.conversation.id

    @property
    def responses(self) -> list[Any]:
        """The completed turns, as llm's response objects."""
        return self.conversation.responses

    async def prompt(self, prompt: str | None = None, **kwargs: Any) -> PromptResponse:
        """Ask the next question, when those asked before have been answered.

        Takes, returns and raises what ``WrappedAsyncModel.prompt()`` does.
        """
        turn = self._turns.ask()
        try:
            kwargs = await self.model._with_found_types(kwargs)
            task = self.model._prompt_task(self.conversation.prompt, prompt, kwargs, turn)
        except BaseException:
            turn.give_up()
            raise
        return await task.start()

    def chain(self, prompt: str | None = None, **kwargs: Any) -> Chain:
        """Ask the next question as a chain; its turn in the conversation is when it is first read.

        Takes, returns and raises what ``WrappedAsyncModel.chain()`` does.
        """
        return self.model._chain(self.conversation.chain, prompt, kwargs, self._turns)

    def __getattr__(self, name: str) -> Any:
        # What llm's conversation says of itself: name, tools, chain_limit, ...
        if name == "conversation":
            raise AttributeError(name)
        return getattr(self.conversation, name)

    def __repr__(self) -> str:
        return f"<WrappedConversation {self.model.model_id} turns={len(self.responses)}>"


class GroupModel(WrappedAsyncModel):
    """The model that a group's block yields: its prompts belong to the group.

    Attributes:
        group: the ``Group`` that hooks receive.
    """

    def __init__(self, datasette: Any, choice: Choice, supervisor: GroupSupervisor) -> None:
        super().__init__(datasette, choice, supervisor)
        self.group = supervisor.group
        self._supervisor: GroupSupervisor = supervisor

    @property
    def refusal(self) -> Refusal | None:
        """What further prompts of the group are refused with, once none can succeed."""
        return self._supervisor.refusal

    @property
    def stats(self) -> GroupStats:
        """What happened to the group's prompts so far; cheap to read."""
        return self.group.stats

    async def _sample_request(self, **kwargs: Any) -> Request:
        """Return what a prompt of an offline group sends; see ``offline.sample_request``."""
        return await sample_request(self.model, self._with_defaults({"stream": False, **kwargs}))

    def cancel(self) -> None:
        """Cancel every prompt of the group, and each one that still comes. Returns at once."""
        self._supervisor.cancel()

    def map(
        self,
        items: Iterable[T] | AsyncIterable[T],
        to_prompt: Callable[[T], str | Mapping[str, Any]] = str,
        **kwargs: Any,
    ) -> PromptMap[T]:
        """Prompt for every item, as many at a time as the group's concurrency allows.

        Args:
            items: an iterable or async iterable of any length, pulled as prompts can be sent.
            to_prompt: what to send for an item: a string, or a dict of ``prompt()`` keywords.
            **kwargs: ``prompt()`` keywords for all items. Answers are asked for unstreamed, which is
                cheaper and can be retried half-way; ``stream=True`` changes that.

        Returns:
            an async iterator of ``(item, response)``, each as soon as it is finished, whatever its
            outcome: ``response.error`` is ``None`` or the item's error. Leaving the loop early cancels
            the prompts in flight.

        Raises:
            Exception: from the loop: what the iterable or ``to_prompt`` raised, when the prompts
                already sent have been yielded.
            PromptCancelled: from the loop: the group has been cancelled.
        """

        def make_task(keywords: Mapping[str, Any]) -> PromptTask:
            arguments = {"stream": False, **kwargs, **keywords}
            prompt = arguments.pop("prompt", None)
            return self._prompt_task(self.model.prompt, prompt, arguments, keep=False)

        return PromptMap(MapRun(self._supervisor, items, to_prompt, make_task))


@asynccontextmanager
async def open_group(
    datasette: Any,
    choose: Callable[[], Awaitable[Choice]],
    *,
    concurrency: int | None = None,
    on_error: Literal["collect", "cancel"] = "collect",
    wait_for_quota: float = 0.0,
    patience: Patience | None = None,
    offline: Offline | None = None,
) -> AsyncIterator[GroupModel]:
    """Open a group of prompts, as ``LLM.group()`` describes it.

    Args:
        datasette: whose plugins wrap the prompts.
        choose: decides model, key and options; called once, on entry.
        concurrency: a fixed number of model calls at once; ``None`` takes what is configured.
        on_error: ``"cancel"`` has the first failed prompt cancel the others and leave the block.
        wait_for_quota: seconds that a quota which is used up may take to come back.
        patience: how prompts wait for a provider that cannot be reached; as for retries by default.
        offline: its prompts reach nobody: their requests are recorded, their answers replayed.
    """
    if concurrency is not None and (isinstance(concurrency, bool) or not isinstance(concurrency, int)):
        raise TypeError(f"concurrency must be a positive int, not {type(concurrency).__name__}")
    if concurrency is not None and concurrency < 1:
        raise ValueError(f"concurrency must be at least 1, not {concurrency}")
    if on_error not in ("collect", "cancel"):
        raise ValueError(f"on_error must be 'collect' or 'cancel', not {on_error!r}")
    choice = await choose()
    supervisor = GroupSupervisor(
        datasette,
        choice,
        concurrency=concurrency,
        on_error=on_error,
        wait_for_quota=wait_for_quota,
        patience=patience,
        offline=offline,
    )
    async with GroupBlock(supervisor):
        yield GroupModel(datasette, choice, supervisor)
