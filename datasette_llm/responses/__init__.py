"""What a caller holds and reads: an answer while it arrives, and afterwards.

Knows llm's responses and any number of readers. Knows nothing of who runs the prompt: a model call publishes
chunks here, readers observe them.
"""
