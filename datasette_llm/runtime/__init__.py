"""The actor runtime: prompts as supervised tasks, on asyncio and on trio.

It knows llm and the plugin hooks, and nothing of configuration, access or pages.
"""
