"""The clients of one owner: a group, or the supervisor of an event loop's standalone prompts.

A pool lives as long as its owner, on one event loop.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread

from . import adoption
from .leases import ClientSets
from .openai_models import PooledFactory

if TYPE_CHECKING:
    from .transport import Observe

logger = logging.getLogger("datasette_llm")


class ClientPool(ClientSets):
    """The clients of one owner, closed together.

    Attributes:
        figures: of workers, where they make the calls.
    """

    figures: Any = None

    def adopt(self, model: Any, observe: Observe | None = None) -> bool:
        """Have a model take its HTTP clients from this pool.

        Args:
            model: a model object that nobody else holds; it gets instance attributes.
            observe: called for each HTTP response, with its status and headers.

        Returns:
            whether the model is of a kind this can be done for; any other is left alone.
        """
        return adoption.adopt(self, model, observe)

    async def prepare(self, model: Any, key: str | None) -> None:
        """Have a worker thread load and make what an adopted model's first prompt will ask for.

        It loads the certificates, 20 milliseconds for which an event loop that serves pages would stand
        still, and the parts of an SDK that are imported when they are first used. A model that was not
        adopted is left alone. Does not raise: what is wrong with a client is found again, and told, by the
        first prompt.

        Args:
            model: the model, as it was adopted.
            key: the API key that its prompts will be sent with.
        """
        held = vars(model)
        factory, execute = held.get("get_client"), held.get("execute")
        try:
            if isinstance(factory, PooledFactory):
                await anyio.to_thread.run_sync(factory.clients_for, key)
            if isinstance(execute, adoption.AdoptedExecute):
                await anyio.to_thread.run_sync(adoption.load_parts, model)
        except Exception as error:
            logger.debug("No client for %s yet: %s", model.model_id, type(error).__name__)
