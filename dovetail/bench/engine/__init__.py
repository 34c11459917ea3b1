"""Speed of an engine in this process. Imports what an engine is made of, and bench's own modules."""
