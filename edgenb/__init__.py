"""From your own labelled examples to a small model that provably works on the device it ships to

Modules:

- `edgenb.agent.machine`: The agent's state machine: one table says what every state does, how long it may take, and what comes after. Written by hand, not exported.
- `edgenb.agent.storage`: What the agent keeps on disk: two slots, fetched blobs, and a journal that names the slot in use. Written by hand, not exported.
- `edgenb.agent.trust`: What the agent believes: TUF metadata, verified by python-tuf, over HTTP or from a folder; and what time it is. Written by hand, not exported."""

__version__ = '0.1.0'
