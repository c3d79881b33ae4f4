"""HTTP clients that are made once and used by many prompts.

Most model plugins make a client for each prompt: 25 ms of CPU, nearly all of it to load certificates, and a
new connection. Here a model object (a copy that nobody else holds) gets instance attributes through which
its prompts lease clients from a pool. Knows SDKs and how they make their clients, each told by what it is;
knows nothing of prompts, groups or pace. No class and no module is patched.
"""
