"""Answers of a given form: grammars are compiled, kept, and turned into masks of tokens.

llguidance does the parsing. Nothing here is imported before the first request that asks for a form.
"""
