"""How long a test waits for what will come."""

from __future__ import annotations

#: Not how long it takes, which no test knows: when to say that it does not come. A machine may be slow, and
#: doing other things as well. A little less than pytest's own bound, which tells less about it.
PATIENCE_SECONDS = 240.0
