"""Host-side scheduling: requests, pages, plans. Imports no torch and nothing below itself."""
