"""Model calls that run in another process: the same call, from `execute()` inwards.

The group's copy of a model gets an ``execute()`` that is the call to a worker (`proxy`). Everything that
decides (slots, pace, retries, wrappers, rows) stays where it is and knows nothing of this. `questions`,
`answers` and `flown_errors` say what crosses, `fleet` which worker gets a call and what becomes of it when
that one dies, `bench` is the worker's side. These know no engine; Dask does the carrying in `dask_source`,
`dask_actor`, `local_cluster`, `local_worker` and `engine`.
"""
