"""asyncio, trio, and Datasette's side of them.

Knows event loops and cancellation. Knows nothing of prompts. `datasette_side` is the one way to Datasette's
own coroutines, which need asyncio; everything else in this package speaks anyio.
"""
