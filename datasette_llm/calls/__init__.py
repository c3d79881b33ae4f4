"""One model call, and what its outcome means.

Knows llm's models, HTTP clients and the ways in which providers fail. Knows nothing of groups or hooks: a
task hands over a response to fill, and the call takes a slot from `pace`, asks, and asks again if that may
help.
"""
