"""Who may use which model, with which key and options, for what purpose.

Knows the configuration, the installed models, the purposes and the secrets. Knows nothing of prompts: the
facade asks here once per model or group, and what comes out is a `calls.choice.Choice`.
"""
