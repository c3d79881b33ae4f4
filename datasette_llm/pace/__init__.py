"""When a model call may go: slots, limits that adapt, cooldowns, announced and fixed rates.

Knows clocks, numbers and headers. Knows nothing of prompts or models. A call takes a slot from a `throttle`,
and says how it went when it gives it back.
"""
