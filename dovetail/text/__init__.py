"""Tokens and text: tokenizers, streaming detokenization, chat templates. Imports core and host only."""
