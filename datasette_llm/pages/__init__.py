"""Everything with HTML: what people do with models in the browser.

A page decides nothing about rows: it starts, shows and stops the jobs of `enrich`.
"""
