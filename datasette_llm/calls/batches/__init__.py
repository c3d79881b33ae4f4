"""Model calls whose requests and answers travel in batches: half the price, within a day.

A model builds a request and reads an answer itself, as in every other call. Here its clients reach nobody:
what it sends is *recorded*, and what a batch brought is *replayed* to it. Knows the providers' protocols for
batches, each in a module of its own, and no tables, rows or jobs.
"""
