"""The server's state at ``/-/llm``: what runs now, what the last hour brought, which models can be used.

``live`` reads how things stand, ``models`` what there is and what is missing; ``trial`` sends one test
prompt, and ``routes`` makes pages of them. Nothing of it is imported before somebody asks for the page.
"""

from __future__ import annotations

#: The permission that it takes; root has it.
PERMISSION = "llm-status"
